"""Prometheus' own verdict on our rules: they parse, and they fire when they should and at no other time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import load_all

from sr_platform.cluster import REPOSITORY_PATH

DASHBOARDS_PATH = REPOSITORY_PATH / "infra" / "dashboards"
# Series as promtool writes them, minute by minute; who is expected to call at which minute.
CASES: dict[str, tuple[dict[str, str], int, list[str]]] = {
    "an old queue": (
        {"faithdiff_oldest_queued_seconds": "2000x60", "faithdiff_process_start_time_seconds": "0x60"},
        40,
        ["FaithDiffQueueTooOld"],
    ),
    "errors of the service": (
        {
            'faithdiff_requests_total{status="500"}': "0+2x60",
            'faithdiff_requests_total{status="200"}': "0+50x60",
            "faithdiff_process_start_time_seconds": "0x60",
        },
        40,
        ["FaithDiffServerErrors"],
    ),
    "a GPU that nobody uses": (
        {
            'DCGM_FI_DEV_GPU_UTIL{namespace="ray",pod="train-1",gpu="0"}': "0x60",
            'DCGM_FI_DEV_GPU_UTIL{namespace="ray",pod="faithdiff-serve-1",gpu="0"}': "0x60",
            "faithdiff_process_start_time_seconds": "0x60",
        },
        40,
        ["FaithDiffTrainingStalled"],
    ),
    "a GPU that works": (
        {
            'DCGM_FI_DEV_GPU_UTIL{namespace="ray",pod="train-1",gpu="0"}': "97x60",
            "faithdiff_process_start_time_seconds": "0x60",
        },
        40,
        [],
    ),
    "no memory left on a GPU": (
        {
            "DCGM_FI_DEV_FB_USED": "80000x60",
            "DCGM_FI_DEV_FB_FREE": "500x60",
            "faithdiff_process_start_time_seconds": "0x60",
        },
        40,
        ["FaithDiffNodeGpuMemoryFull"],
    ),
    # 20 nodes of 10 USD an hour are 146,000 USD a month.
    "nodes that cost more than the budget": (
        {
            **{
                f'kube_node_labels{{label_karpenter_sh_capacity_type="spot",label_node_kubernetes_io_instance_type='
                f'"g6e.12xlarge",label_topology_kubernetes_io_zone="us-west-2a",node="n{n}"}}': "1x120"
                for n in range(20)
            },
            'karpenter_cloudprovider_instance_type_offering_price_estimate{instance_type="g6e.12xlarge",'
            'capacity_type="spot",zone="us-west-2a"}': "10x120",
            "faithdiff_process_start_time_seconds": "0x120",
        },
        100,
        ["FaithDiffCostAboveBudget"],
    ),
    "nobody answers": ({"up": "0x60"}, 10, ["FaithDiffSilent"]),
}


@pytest.fixture(scope="module")
def rules_path(rendered: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules of dev as Prometheus gets them from the operator."""
    rule = next(document for document in load_all(rendered["dev"]) if document["kind"] == "PrometheusRule")
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    return path


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_are_what_prometheus_reads(rules_path: Path) -> None:
    files = [DASHBOARDS_PATH / "alerts.yaml", DASHBOARDS_PATH / "cluster-alerts.yaml"]
    written = [
        rule for path in files for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
    ]
    assert f"SUCCESS: {len(written)} rules found" in promtool("check", "rules", str(rules_path))


@pytest.mark.parametrize("case", CASES)
def test_whoever_should_be_called_is_called_and_nobody_else(rules_path: Path, tmp_path: Path, case: str) -> None:
    series, minute, expected = CASES[case]
    names = [r["alert"] for g in yaml.safe_load(rules_path.read_text())["groups"] for r in g["rules"] if "alert" in r]
    values = [{"series": name, "values": value} for name, value in series.items()]
    called = [asked(name, minute, case) for name in names if name not in expected]
    test = {"interval": "1m", "input_series": values, "alert_rule_test": called}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": [str(rules_path)], "tests": [test]}))
    promtool("test", "rules", str(tmp_path / "test.yaml"))
    # promtool wants every label and annotation of an alert that fires; that it fires is all that is asked here.
    for name in expected:
        test["alert_rule_test"] = [asked(name, minute, case)]
        (tmp_path / "fires.yaml").write_text(yaml.safe_dump({"rule_files": [str(rules_path)], "tests": [test]}))
        command = ["promtool", "test", "rules", str(tmp_path / "fires.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert f"alertname: {name}" in done.stdout + done.stderr
        assert "got:[" in (done.stdout + done.stderr).replace("\n", "").replace(" ", "")


def asked(name: str, minute: int, case: str) -> dict[str, Any]:
    """That `name` does not fire."""
    return {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": []}


def test_the_clusters_dashboard_is_like_the_other() -> None:
    made = json.loads((DASHBOARDS_PATH / "cluster.json").read_text())
    assert (made["uid"], made["title"]) == ("faithdiff-cluster", "FaithDiff cluster")
    titles = [panel["title"] for panel in made["panels"]]
    assert len(set(titles)) == len(titles)
    for panel in made["panels"]:
        assert panel["description"].endswith("."), panel["title"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    groups = yaml.safe_load((DASHBOARDS_PATH / "cluster-alerts.yaml").read_text())["groups"]
    named = [rule["annotations"]["action"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert 'See "Nodes by type"' in " ".join(named)
    assert "Nodes by type" in titles
