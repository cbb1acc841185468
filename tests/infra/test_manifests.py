"""What kubectl would send: goldens, schemas, and names that agree from file to file."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_kubernetes import running
from manifests import NO_SCHEMAS, Schemas, load_all, schemas_path

from sr_platform.cluster import REPOSITORY_PATH

GOLDEN_PATH = Path(__file__).parent / "golden"
KUBERNETES_PATH = REPOSITORY_PATH / "infra" / "kubernetes"
ENVIRONMENTS = ("dev", "prod")
JOBS = sorted(path.stem for path in (KUBERNETES_PATH / "jobs").glob("*.yaml"))


@pytest.fixture(scope="module")
def schemas() -> Schemas:
    return Schemas(schemas_path())


@pytest.fixture(scope="module")
def jobs(overlays: dict[str, Any]) -> dict[str, str]:
    """Every job's manifest, by environment and name."""
    return {
        f"{environment}-{job}": copy.script("job.sh", environment, job, "DATASET=faces", DRY_RUN="yes").stdout.replace(
            copy_time(copy, environment, job), "now"
        )
        for environment, copy in overlays.items()
        for job in JOBS
    }


def copy_time(copy: Any, environment: str, job: str) -> str:
    name = load_all(copy.script("job.sh", environment, job, DRY_RUN="yes").stdout)[0]["metadata"]["name"]
    return str(name).removeprefix(f"{job}-")


@pytest.fixture(scope="module")
def everything(rendered: dict[str, str], jobs: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """All documents of an environment, jobs included."""
    return {
        environment: load_all(text)
        + [d for key, job in jobs.items() if key.startswith(environment) for d in load_all(job)]
        for environment, text in rendered.items()
    }


def named(document: dict[str, Any]) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def pod_specs(document: Any) -> Iterator[dict[str, Any]]:
    """Every pod spec anywhere in a document."""
    if isinstance(document, dict):
        if "containers" in document and isinstance(document["containers"], list):
            yield document
        for value in document.values():
            yield from pod_specs(value)
    elif isinstance(document, list):
        for value in document:
            yield from pod_specs(value)


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def check_golden(name: str, text: str) -> None:
    """`UPDATE_GOLDENS=yes pytest tests/infra/test_manifests.py` writes them anew: read the difference in git."""
    path = GOLDEN_PATH / name
    if os.environ.get("UPDATE_GOLDENS") == "yes":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{name} differs; see check_golden"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_an_overlay_renders_as_it_did(rendered: dict[str, str], environment: str) -> None:
    # The dashboards lie in infra/dashboards as they are.
    objects = [text for text in rendered[environment].split("\n---\n") if "name: faithdiff-dashboards" not in text]
    check_golden(f"{environment}.yaml", "\n---\n".join(objects))


def test_a_job_renders_as_it_did(jobs: dict[str, str]) -> None:
    for name, text in jobs.items():
        check_golden(f"job-{name}.yaml", text.replace(re.search(r"\d{8}-\d{6}|now", text)[0], "now"))  # type: ignore[index]


@NO_SCHEMAS
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_object_is_what_its_schema_allows(everything: dict[str, Any], schemas: Schemas, environment: str) -> None:
    documents = everything[environment]
    assert len(documents) > 30
    wrong = {named(document): found for document in documents if (found := schemas.errors_of(document))}
    assert wrong == {}


@NO_SCHEMAS
@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("RayService", "maxReplicas", "maxReplica"),
        ("RayService", "periodSeconds", "periodSecond"),
        ("RayCluster", "authOptions", "authOption"),
        ("RayJob", "activeDeadlineSeconds: 172800", 'activeDeadlineSeconds: "two days"'),
        ("NodePool", "consolidateAfter", "consolidateafter"),
        ("EC2NodeClass", "instanceProfile", "instanceProfil"),
        ("PodMonitor", "podMetricsEndpoints", "podMetricEndpoints"),
        ("PrometheusRule", "annotations", "annotation"),
        ("Deployment", "readinessProbe", "readynessProbe"),
        ("NetworkPolicy", "podSelector", "podSelectors"),
        ("PriorityClass", "preemptionPolicy", "preemption"),
    ],
)
def test_a_typo_is_refused(everything: dict[str, Any], schemas: Schemas, kind: str, right: str, wrong: str) -> None:
    texts = [yaml.safe_dump(document) for document in everything["dev"] if document["kind"] == kind]
    broken = [yaml.safe_load(text.replace(right, wrong)) for text in texts if right in text]
    assert broken
    assert all(schemas.errors_of(document) for document in broken)


@NO_SCHEMAS
def test_kubectl_applies_it_server_side_twice(overlays: dict[str, Any], schemas: Schemas, tmp_path: Path) -> None:
    folder = overlays["dev"].path / "kubernetes" / "overlays" / "dev"
    with running(schemas) as (url, cluster):
        (tmp_path / "config").write_text("apiVersion: v1\nkind: Config\n")
        command = ["kubectl", "--server", url, "--kubeconfig", str(tmp_path / "config"), "apply", "--server-side"]
        command += ["--cache-dir", str(tmp_path / "cache"), "-k", str(folder)]
        for _ in range(2):
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        applied = {(kind, name) for _, kind, name in cluster.log}
    assert {("RayService", "faithdiff"), ("RayCluster", "jobs"), ("NodePool", "train")} <= applied
    assert ("ConfigMap", "serve-config") not in applied


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_images_are_pinned_and_ours_come_from_the_registry(everything: dict[str, Any], environment: str) -> None:
    images = {c["image"] for d in everything[environment] for pod in pod_specs(d) for c in containers(pod)}
    ours = {image for image in images if ".dkr.ecr." in image}
    assert {image.split("/")[-1].split(":")[0] for image in ours} == {"train", "serve", "mlflow"}
    assert {image.split(":")[-1] for image in ours} == {"0123456789ab"}
    for image in images - ours:
        assert re.search(r":v?\d+\.\d+[\w.-]*$", image), image


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_everything_a_pod_refers_to_exists(everything: dict[str, Any], environment: str) -> None:
    documents = everything[environment]
    known = {(d["kind"], d["metadata"]["name"]) for d in documents}
    config_maps = {d["metadata"]["name"]: set(d.get("data", {})) for d in documents if d["kind"] == "ConfigMap"}
    missing = []
    for document in documents:
        for pod in pod_specs(document):
            missing += [f"{named(document)}: {what}" for what in missing_references(pod, known, config_maps)]
    assert missing == []


def missing_references(pod: dict[str, Any], known: set[tuple[str, str]], maps: dict[str, set[str]]) -> Iterator[str]:
    account = pod.get("serviceAccountName")
    if account is not None and ("ServiceAccount", account) not in known:
        yield f"service account {account}"
    priority = pod.get("priorityClassName", "system-")
    if not priority.startswith("system-") and ("PriorityClass", priority) not in known:
        yield f"priority class {priority}"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    yield from (
        f"config map {v['configMap']['name']}"
        for v in pod.get("volumes", [])
        if v.get("configMap", {}).get("name", next(iter(maps))) not in maps
    )
    for container in containers(pod):
        yield from (f"volume {m['name']}" for m in container.get("volumeMounts", []) if m["name"] not in volumes)
        ports = {port["name"] for port in container.get("ports", [])}
        probes = [container[key] for key in ("startupProbe", "readinessProbe", "livenessProbe") if key in container]
        asked = [probe["httpGet"]["port"] for probe in probes if "httpGet" in probe]
        yield from (f"port {port}" for port in asked if isinstance(port, str) and port not in ports)
        for source in container.get("envFrom", []):
            if source["configMapRef"]["name"] not in maps:
                yield f"config map {source['configMapRef']['name']}"
        for variable in container.get("env", []):
            key = variable.get("valueFrom", {}).get("configMapKeyRef")
            if key is not None and key["key"] not in maps.get(key["name"], set()):
                yield f"key {key['key']} of config map {key['name']}"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_services_monitors_and_budgets_select_pods_that_there_are(everything: dict[str, Any], environment: str) -> None:
    labels = [labels for document in everything[environment] for labels in pod_labels(document)]
    for document in everything[environment]:
        selector = {
            "Service": lambda d: d["spec"].get("selector"),
            "PodMonitor": lambda d: d["spec"]["selector"].get("matchLabels"),
            "PodDisruptionBudget": lambda d: d["spec"]["selector"]["matchLabels"],
            "NetworkPolicy": lambda d: d["spec"]["podSelector"].get("matchLabels"),
        }.get(document["kind"], lambda d: None)(document)
        if selector:
            assert any(selector.items() <= one.items() for one in labels), named(document)


def pod_labels(document: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Labels of pods; of Ray's with those that KubeRay adds."""
    if document["kind"] in ("Deployment", "DaemonSet"):
        yield document["spec"]["template"]["metadata"]["labels"]
    for cluster in ray_clusters(document):
        yield cluster["headGroupSpec"]["template"]["metadata"]["labels"] | {"ray.io/node-type": "head"}
        for group in cluster["workerGroupSpecs"]:
            added = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
            yield group["template"]["metadata"]["labels"] | added


def ray_clusters(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = document.get("spec", {})
    if document["kind"] == "RayCluster":
        yield spec
    yield from (spec[key] for key in ("rayClusterConfig", "rayClusterSpec") if key in spec)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_service_accounts_are_those_that_terraform_ties_to_roles(
    everything: dict[str, Any], facts: Any, environment: str
) -> None:
    tied = facts[environment]["service_accounts"]
    by_terraform = {(one["namespace"], one["name"]) for accounts in tied.values() for one in accounts}
    ours = {
        (d["metadata"]["namespace"], d["metadata"]["name"])
        for d in everything[environment]
        if d["kind"] == "ServiceAccount"
    }
    assert ours == by_terraform


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_version_of_ray_is_the_one_in_the_images(everything: dict[str, Any], environment: str) -> None:
    pinned = re.search(r"^ray==(.+)$", (REPOSITORY_PATH / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    clusters = [cluster for document in everything[environment] for cluster in ray_clusters(document)]
    assert len(clusters) == 2 + len(JOBS)
    assert {cluster["rayVersion"] for cluster in clusters} == {pinned[1]}
    assert {cluster["authOptions"]["mode"] for cluster in clusters} == {"token"}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_pods_of_ours_run_confined(everything: dict[str, Any], environment: str) -> None:
    """What the namespaces enforce (pod security `restricted`), so that no pod is refused when it is too late."""
    confined = [d for d in everything[environment] if d["metadata"].get("namespace") in ("ray", "mlflow")]
    pods = [(named(document), pod) for document in confined for pod in pod_specs(document)]
    assert len(pods) > 10
    for name, pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        for container in containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"]["drop"] == ["ALL"], name
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_pods_fit_the_nodes_that_are_started_for_them(everything: dict[str, Any], facts: Any, environment: str) -> None:
    """Each pod fits the smallest node of a pool of its role, less what the system takes (a tenth, at least 1 GiB)."""
    types = facts[environment]["instance_types"]
    pools = [one for one in load_all_of(everything[environment], "NodePool")]
    system = facts[environment]["system_nodes"]
    nodes = {"system": system["instance_types"]}
    for pool in pools:
        spec = pool["spec"]["template"]
        named_types = next(
            r["values"] for r in spec["spec"]["requirements"] if r["key"] == "node.kubernetes.io/instance-type"
        )
        nodes.setdefault(spec["metadata"]["labels"]["faithdiff/role"], []).extend(named_types)
    checked = set()
    for document in everything[environment]:
        for pod in pod_specs(document):
            role = pod.get("nodeSelector", {}).get("faithdiff/role")
            if role is None:
                continue
            wanted = [quantity_of(pod, what) for what in ("cpu", "memory", "nvidia.com/gpu")]
            fitting = [t for t in nodes[role] if fits(wanted, types[t])]
            assert fitting, f"{named(document)} wants {wanted} of {nodes[role]}"
            checked.add(role)
    assert checked == {"system", "serve", "train", "prepare"}


def load_all_of(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


def quantity_of(pod: dict[str, Any], what: str) -> float:
    return sum(quantity(container["resources"]["requests"].get(what, "0")) for container in containers(pod))


def quantity(text: str | int) -> float:
    """Cores, GiB or GPUs."""
    units = {"m": 1e-3, "Ki": 2**-20, "Mi": 2**-10, "Gi": 1.0}
    found = re.fullmatch(r"([\d.]+)(m|Ki|Mi|Gi)?", str(text))
    assert found is not None, text
    return float(found[1]) * units.get(found[2] or "", 1.0)


def fits(wanted: list[float], node: dict[str, float]) -> bool:
    room = [node["vcpus"] * 0.96, node["memory_gib"] - max(1.0, 0.08 * node["memory_gib"]), node["gpus"]]
    return all(want <= has for want, has in zip(wanted, room, strict=True))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_what_always_runs_fits_the_system_nodes(everything: dict[str, Any], facts: Any, environment: str) -> None:
    """Heads, gateways, the registry, twice what serves (an upgrade), one job; 2 CPUs and 6 GiB for operators."""
    system = facts[environment]["system_nodes"]
    node = facts[environment]["instance_types"][system["instance_types"][0]]
    cpu, memory = 2.0, 6.0
    for document in everything[environment]:
        times = {"RayService": 2, "Deployment": document.get("spec", {}).get("replicas", 1)}.get(document["kind"], 1)
        if document["kind"] == "RayJob" and not document["metadata"]["name"].startswith("train"):
            continue
        for pod in pod_specs(document):
            if pod.get("nodeSelector", {}).get("faithdiff/role") == "system":
                cpu += times * quantity_of(pod, "cpu")
                memory += times * quantity_of(pod, "memory")
    assert cpu <= system["min_size"] * node["vcpus"] * 0.96
    assert memory <= system["min_size"] * (node["memory_gib"] - 1.5)


def test_commands_in_pods_name_files_that_the_image_has(everything: dict[str, Any]) -> None:
    text = yaml.safe_dump_all(everything["prod"])
    files = sorted(set(re.findall(r"/app/([\w./-]+\.py)", text)))
    assert [name for name in files if not (REPOSITORY_PATH / name).is_file()] == []
    assert "pipelines/train.py" in files
    copied = re.findall(
        r"^COPY (.+) \S+$", (REPOSITORY_PATH / "infra/images/Dockerfile").read_text(), flags=re.MULTILINE
    )
    sources = [source for line in copied for source in line.split()]
    assert [name for name in files if not any(name == s or name.startswith(f"{s}/") for s in sources)] == []


def test_alerts_and_dashboards_ask_dcgm_only_for_what_it_is_told_to_count() -> None:
    counters = (KUBERNETES_PATH / "base/nodes/dcgm-counters.csv").read_text().splitlines()
    counted = {row[0] for row in csv.reader(line for line in counters if not line.startswith("#"))}
    dashboards = REPOSITORY_PATH / "infra" / "dashboards"
    asked = set(re.findall(r"DCGM_\w+", "".join(path.read_text() for path in dashboards.glob("cluster*"))))
    assert asked
    assert asked <= counted


def test_the_gateways_are_scraped_once_and_under_the_name_that_alerts_use(rendered: dict[str, str]) -> None:
    values = yaml.safe_load((KUBERNETES_PATH / "operators/values/kube-prometheus-stack.yaml").read_text())
    [job] = values["prometheus"]["prometheusSpec"]["additionalScrapeConfigs"]
    service = next(d for d in load_all(rendered["dev"]) if d["kind"] == "RayService")
    assert job["job_name"] == "faithdiff"
    # KubeRay names the service of a RayService after it.
    [target] = job["static_configs"][0]["targets"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert target == f"{service['metadata']['name']}-serve-svc.ray.svc:{config['http_options']['port']}"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_serve_takes_the_configuration(rendered: dict[str, str], environment: str) -> None:
    """Ray's own schema, and ours for the arguments: a name that neither knows would stop the deployment."""
    from ray.serve.schema import ServeDeploySchema

    from serve.app import ServeConfig
    from sr_platform.config import validate

    service = next(d for d in load_all(rendered[environment]) if d["kind"] == "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    shipped = yaml.safe_load((REPOSITORY_PATH / "serve" / "app.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(config).applications
    assert (application.import_path, application.name) == ("serve.app:build_app", "faithdiff")
    assert config["http_options"].keys() == shipped["http_options"].keys()
    cfg = validate(ServeConfig, config["applications"][0]["args"], where="serve")
    assert cfg.gateway.access.mode == "keys"
    assert cfg.gateway.storage_uri.startswith("s3://faithdiff-")
    group = next(g for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    assert cfg.restorer.autoscaling.max_replicas == group["maxReplicas"]
    assert cfg.restorer.num_cpus <= quantity_of(group["template"]["spec"], "cpu")
    assert config["http_options"]["port"] in ports_of(group["template"]["spec"])


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_node_serves_behind_haproxy_and_cuts_no_request_short(rendered: dict[str, str], environment: str) -> None:
    service = next(d for d in load_all(rendered[environment]) if d["kind"] == "RayService")
    longest_s = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["request_timeout_s"]
    for pod in pod_specs(service):
        [ray] = pod["containers"]
        variables = {variable["name"]: variable.get("value") for variable in ray["env"]}
        assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert float(variables["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= longest_s


def ports_of(pod: dict[str, Any]) -> list[int]:
    return [port["containerPort"] for container in containers(pod) for port in container.get("ports", [])]
