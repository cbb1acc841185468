"""A scanner over everything: no finding that is not explained beside the code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import load_all

from sr_platform.cluster import REPOSITORY_PATH

INFRA_PATH = REPOSITORY_PATH / "infra"
CHECKOV = Path(sys.prefix) / "scan" / "bin" / "checkov"
# The scanner does not look into Ray's objects, so their pods are taken out; these hold for all of them.
RAY_PODS = {
    "CKV_K8S_8": "KubeRay adds the probes of heads and workers",
    "CKV_K8S_9": "the same",
    "CKV_K8S_22": "Ray and DeepSpeed write beside their packages when kernels are first built",
    "CKV_K8S_38": "the autoscaler beside a head asks the Kubernetes API; workers mount no token",
}

pytestmark = pytest.mark.timeout(600)


def findings(framework: str, *where: str) -> list[str]:
    command = [str(CHECKOV), "--config-file", str(INFRA_PATH / "checkov.yaml"), "--framework", framework, "-o", "json"]
    done = subprocess.run([*command, *where], capture_output=True, text=True, timeout=540)
    assert done.stdout, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 50, report["summary"]
    assert report["summary"]["parsing_errors"] == 0
    return [f"{one['check_id']} {one['resource']}: {one['check_name']}" for one in report["results"]["failed_checks"]]


def ray_pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = document.get("spec", {})
    spec = spec.get("rayClusterConfig", spec.get("rayClusterSpec", spec))
    if "headGroupSpec" not in spec:
        return
    skips = {f"checkov.io/skip{n}": f"{check}={why}" for n, (check, why) in enumerate(RAY_PODS.items())}
    for number, group in enumerate([spec["headGroupSpec"], *spec["workerGroupSpecs"]]):
        name = f"{document['kind'].lower()}-{document['metadata']['name']}-{number}"
        metadata = {"name": name, "namespace": "ray", "annotations": skips}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]}


def test_terraform_has_no_unexplained_finding() -> None:
    assert findings("terraform", "-d", str(INFRA_PATH / "terraform")) == []


@pytest.mark.parametrize("environment", ["dev", "prod"])
def test_manifests_have_no_unexplained_finding(
    rendered: dict[str, str], overlays: dict[str, Any], tmp_path: Path, environment: str
) -> None:
    job = overlays[environment].script("job.sh", environment, "train", DRY_RUN="yes").stdout
    documents = load_all(rendered[environment]) + load_all(job)
    pods = [pod for document in documents for pod in ray_pods(document)]
    assert len(pods) == 8
    (tmp_path / "objects.yaml").write_text(yaml.safe_dump_all([*load_all(rendered[environment]), *pods]))
    assert findings("kubernetes", "-d", str(tmp_path)) == []


def test_the_dockerfile_has_no_finding() -> None:
    assert findings("dockerfile", "-f", str(INFRA_PATH / "images" / "Dockerfile")) == []
