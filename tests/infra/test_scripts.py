"""The deploy scripts: clean to a linter, clear when asked for nonsense, and in the right order when they work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_kubernetes import Cluster, running
from manifests import NO_SCHEMAS_REASON, Schemas, schemas_path

from sr_platform.cluster import REPOSITORY_PATH

SCRIPTS_PATH = REPOSITORY_PATH / "infra" / "scripts"
SCRIPTS = sorted(path.name for path in SCRIPTS_PATH.glob("*.sh"))
RUNNABLE = sorted(set(SCRIPTS) - {"templates.sh"})
PROGRAMS_LOG = """#!/usr/bin/env bash
echo "{name} $*" >> "{log}"
{more}
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_clean_to_shellcheck(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--external-sources", "--shell=bash", SCRIPTS_PATH / name], capture_output=True, text=True
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_script_stops_at_the_first_failure_and_says_what_it_does(name: str) -> None:
    text = (SCRIPTS_PATH / name).read_text()
    assert text.startswith(f"#!/usr/bin/env bash\n# {name} ENVIRONMENT")
    assert "\nset -euo pipefail\n" in text
    assert os.access(SCRIPTS_PATH / name, os.X_OK)


@pytest.mark.parametrize("name", RUNNABLE)
def test_an_unknown_environment_is_told_with_those_there_are(infra_copy: Any, name: str) -> None:
    done = infra_copy.script(name, "production", allowed=(2,))
    assert done.stderr == f"{name}: environment: got 'production'; give one of: dev prod\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "job: got 'trian'; give one of: ablate evaluate prepare train"),
        (
            ["train", "DATASETS=faces"],
            "setting: got 'DATASETS=faces'; give NAME=value with one of: JOB_NAME RECIPE DATASET",
        ),
        (["train", "faces"], "setting: got 'faces'"),
    ],
)
def test_a_wrong_job_or_setting_is_told(overlays: dict[str, Any], arguments: list[str], told: str) -> None:
    assert told in overlays["dev"].script("job.sh", "dev", *arguments, allowed=(2,)).stderr


def test_a_name_without_a_value_stops_before_anything_is_written(infra_copy: Any) -> None:
    infra_copy.stand_in_outputs("dev", "kind: NodePool\n")
    outputs = infra_copy.path.parent / "outputs" / "platform_env"
    outputs.write_text(outputs.read_text().replace("RESULTS_BUCKET", "RESULT_BUCKET"))
    done = infra_copy.script("render.sh", "dev", allowed=(2,))
    assert "serve.template.yaml: no value for RESULTS_BUCKET" in done.stderr
    overlay = infra_copy.path / "kubernetes" / "overlays" / "dev"
    assert [name for name in ("platform.env", "serve.yaml") if (overlay / name).exists()] == []


def test_settings_of_a_job_reach_its_command(overlays: dict[str, Any]) -> None:
    done = overlays["prod"].script(
        "job.sh", "prod", "train", "DATASET=faces", "RECIPE=train_sdxl_8xh100.yaml", "OUT=runs/faces-1", DRY_RUN="yes"
    )
    wanted = (
        "python /app/pipelines/train.py train_sdxl_8xh100.yaml "
        "--data s3://faithdiff-prod-data-123456789012/shards/faces "
        "--out s3://faithdiff-prod-checkpoints-123456789012/runs/faces-1"
    )
    assert wanted in done.stdout


class Deployment:
    """A copy of infra/ after Terraform, before Kubernetes: kubectl speaks to a server of the test."""

    def __init__(self, copy: Any, url: str, cluster: Cluster) -> None:
        self.copy, self.cluster = copy, cluster
        self.log_path = copy.path.parent / "programs.log"
        config = copy.path.parent / "config"
        config.write_text(json.dumps(kubeconfig(url)))
        copy.env["KUBECONFIG"] = str(config)
        for name in ("aws", "helm"):
            copy.stand_in(name, PROGRAMS_LOG.format(name=name, log=self.log_path, more=""))

    def programs(self) -> list[str]:
        return self.log_path.read_text().splitlines()


def kubeconfig(url: str) -> dict[str, Any]:
    """What `aws eks update-kubeconfig --alias faithdiff-dev` leaves behind, for the server at `url`."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {"token": "t"}}],
        "contexts": [{"name": "faithdiff-dev", "context": {"cluster": "fake", "user": "me"}}],
    }


@pytest.fixture
def deployment(infra_copy: Any, facts: dict[str, Any]) -> Iterator[Deployment]:
    if schemas_path() is None:
        pytest.skip(NO_SCHEMAS_REASON)
    with running(Schemas(schemas_path())) as (url, cluster):
        infra_copy.stand_in_outputs("dev", facts["dev"]["node_pools_yaml"])
        yield Deployment(infra_copy, url, cluster)


def test_the_platform_goes_up_twice_and_down_again(deployment: Deployment) -> None:
    deployment.copy.script("platform.sh", "dev", METRICS_TOKEN_SHA256="")
    cluster = deployment.cluster
    assert set(cluster.of_kind("RayService")) == {"faithdiff"}
    assert set(cluster.of_kind("NodePool")) == {"cpu", "serve", "train"}
    secrets = json.dumps(cluster.of_kind("Secret"), sort_keys=True, default=str)
    charts = [line for line in deployment.programs() if line.startswith("helm")]
    assert [
        re.search(r"(kuberay-operator|karpenter|kube-prometheus-stack)[ /].*--version \S+", c) for c in charts
    ].count(None) == 0
    assert len(charts) == 3

    deployment.copy.script("platform.sh", "dev", METRICS_TOKEN_SHA256="")
    assert json.dumps(cluster.of_kind("Secret"), sort_keys=True, default=str) == secrets, "secrets are made once"

    cluster.log.clear()
    deployment.copy.script("down.sh", "dev", AUTO_APPROVE="yes")
    gone = [kind for action, kind, _ in cluster.log if action == "delete"]
    assert gone.index("RayService") < gone.index("NodePool") < gone.index("EC2NodeClass")
    terraform = (deployment.copy.path.parent / "outputs" / "log").read_text().splitlines()
    assert [line.split()[2] for line in terraform] == ["destroy"]
    assert cluster.of_kind("RayCluster") == cluster.of_kind("NodePool") == {}


def test_down_wants_the_name_of_what_it_deletes(deployment: Deployment) -> None:
    done = deployment.copy.script("down.sh", "dev", allowed=(1, 2))
    assert done.returncode != 0
    assert deployment.cluster.log == []


def test_a_deploy_of_one_environment_over_another_is_refused(deployment: Deployment) -> None:
    done = deployment.copy.script("platform.sh", "prod", allowed=(2,))
    assert "Terraform is at dev, not at prod; run infra/scripts/up.sh prod" in done.stderr
    assert deployment.cluster.log == []


def test_a_job_is_created_under_a_name_of_its_own(deployment: Deployment) -> None:
    deployment.copy.script("platform.sh", "dev", METRICS_TOKEN_SHA256="")
    deployment.copy.script("job.sh", "dev", "train", "DATASET=faces")
    [name] = deployment.cluster.of_kind("RayJob")
    assert name.startswith("train-20")


def test_up_makes_the_state_bucket_then_aws_then_kubernetes(infra_copy: Any) -> None:
    log = infra_copy.path.parent / "programs.log"
    outputs = 'case "$*" in *state_bucket*) echo the-bucket ;; esac'
    infra_copy.stand_in("terraform", PROGRAMS_LOG.format(name="terraform", log=log, more=outputs))
    infra_copy.script("up.sh", "dev", AUTO_APPROVE="yes", ONLY_AWS="yes")
    steps = log.read_text().splitlines()
    assert [step.split()[2] for step in steps] == ["init", "apply", "output", "init", "apply"]
    assert "-backend-config=bucket=the-bucket" in steps[3]
    assert steps[4].endswith("apply -input=false -auto-approve -var-file=envs/dev.tfvars")
