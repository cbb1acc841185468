"""Terraform and kubectl as tests run them, with AWS and Kubernetes on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from sr_platform.cluster import REPOSITORY_PATH

# Emulators and validators lie beside the tests; with --import-mode=importlib their folder is on no path.
HERE_PATH = Path(__file__).parent
sys.path.insert(0, str(HERE_PATH))
INFRA_PATH = REPOSITORY_PATH / "infra"
REGION = "us-west-2"
ENVIRONMENTS = ("dev", "prod")
_TARGETS = (
    'module.roles["prepare"]',
    'module.roles["train"]',
    "module.cluster.aws_eks_access_policy_association.admin",
)
ROLE_FLAGS = ("-input=false", "-no-color", "-var-file=envs/dev.tfvars", *(f"-target={target}" for target in _TARGETS))
_SOURCES_ONLY = shutil.ignore_patterns(".terraform", "*.tfstate*", "platform.env", "node-pools.yaml", "serve.yaml")


def plugin_mirror() -> Path | None:
    """A folder with provider plugins, for machines that do not reach the registry: of TF_PLUGIN_MIRROR, or found."""
    named = os.environ.get("TF_PLUGIN_MIRROR")
    candidates = (
        [Path(named)] if named else [*sorted(Path("/").glob("*/tf-plugins")), Path.home() / ".terraform.d/plugins"]
    )
    return next((path for path in candidates if (path / "registry.terraform.io" / "hashicorp" / "aws").is_dir()), None)


def cli_config() -> str:
    """Terraform's own configuration: providers from the mirror where there is one, else from the registry."""
    mirror = plugin_mirror()
    if mirror is None:
        return "disable_checkpoint = true\n"
    return (
        f'provider_installation {{\n  filesystem_mirror {{\n    path = "{mirror}"\n'
        '    include = ["registry.terraform.io/hashicorp/*"]\n  }\n}\ndisable_checkpoint = true\n'
    )


class Terraform:
    """One root module in a folder of its own, against one endpoint."""

    def __init__(self, folder: Path, config_path: Path, endpoint: str | None = None) -> None:
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_"))}
        # Credentials that an emulator takes; without an endpoint nothing is called.
        self.env |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
        self.env |= {"TF_CLI_CONFIG_FILE": str(config_path), "TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"}
        if endpoint is not None:
            self.env["AWS_ENDPOINT_URL"] = endpoint

    def run(
        self, *arguments: str, allowed: tuple[int, ...] = (0,), stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["terraform", *arguments],
            cwd=self.folder,
            env=self.env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=540,
        )
        assert done.returncode in allowed, (
            f"terraform {' '.join(arguments)}\n{done.stdout[-6000:]}{done.stderr[-4000:]}"
        )
        return done

    def local_state(self) -> None:
        """Keeps the state in the folder, where a test is not about the backend."""
        (self.folder / "backend_override.tf").write_text('terraform {\n  backend "local" {}\n}\n')

    def init(self, *arguments: str) -> None:
        self.run("init", "-input=false", "-no-color", "-lockfile=readonly", *arguments)

    def evaluate(self, expression: str, *arguments: str) -> Any:
        """The value of an expression that needs no state."""
        answer = self.run("console", *arguments, stdin=f"jsonencode({expression})\n").stdout
        return json.loads(json.loads(answer))

    def outputs(self) -> dict[str, Any]:
        return {name: output["value"] for name, output in json.loads(self.run("output", "-json").stdout).items()}


@pytest.fixture(scope="session")
def terraform_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("terraform") / "terraformrc"
    path.write_text(cli_config())
    return path


@pytest.fixture(scope="session")
def make_terraform(tmp_path_factory: pytest.TempPathFactory, terraform_config: Path) -> Callable[..., Terraform]:
    """`make_terraform("." or "bootstrap", endpoint=None)`: a copy of the root, not initialised yet."""

    def make(root: str = ".", endpoint: str | None = None) -> Terraform:
        folder = tmp_path_factory.mktemp("stack") / "terraform"
        shutil.copytree(INFRA_PATH / "terraform", folder, ignore=_SOURCES_ONLY)
        return Terraform(folder / root, terraform_config, endpoint)

    return make


@pytest.fixture(scope="session")
def initialised(make_terraform: Callable[..., Terraform]) -> Terraform:
    """The main root, ready for whatever calls no AWS."""
    made = make_terraform()
    made.local_state()
    made.init()
    return made


@contextmanager
def emulated_aws() -> Iterator[str]:
    """The URL of an emulated AWS without anything in it."""
    command = [sys.executable, str(HERE_PATH / "aws_emulator.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate("", timeout=30)


@pytest.fixture(scope="module")
def aws() -> Iterator[str]:
    """As `emulated_aws`; a module may give it something to hold."""
    with emulated_aws() as url:
        yield url


@dataclass
class Roles:
    """Terraform's stack with the roles of jobs and what they need, in an AWS of their own."""

    stack: Terraform
    aws: str
    flags: tuple[str, ...]
    applied: Future[Any]


@pytest.fixture(scope="session")
def roles(make_terraform: Callable[..., Terraform]) -> Iterator[Roles]:
    """They are being made; `applied.result()` when they are."""
    with emulated_aws() as url, ThreadPoolExecutor(1) as thread:
        made = make_terraform(".", url)
        made.local_state()
        made.init()
        yield Roles(made, url, ROLE_FLAGS, thread.submit(made.run, "apply", "-auto-approve", *ROLE_FLAGS))


@pytest.fixture(scope="session", autouse=True)
def _roles_while_others_work(request: pytest.FixtureRequest) -> None:
    """AWS keeps Terraform waiting for a minute and a half, which begins with the first test of this room."""
    if any("roles" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("roles")


@pytest.fixture(scope="module")
def aws_client(aws: str) -> Callable[..., Any]:
    """`aws_client("s3")` as the account's owner; `aws_client("s3", credentials)` as somebody else."""

    def make(service: str, credentials: dict[str, str] | None = None) -> Any:
        who = credentials or {"AccessKeyId": "test", "SecretAccessKey": "test"}
        return boto3.client(
            service,
            endpoint_url=aws,
            region_name=REGION,
            aws_access_key_id=who["AccessKeyId"],
            aws_secret_access_key=who["SecretAccessKey"],
            aws_session_token=who.get("SessionToken"),
        )

    return make


TERRAFORM_STAND_IN = """#!/usr/bin/env bash
# Answers `terraform output -raw NAME` from files of that name, for tests that are not about Terraform.
case " $* " in
  *" output "*) cat "{folder}/${{@: -1}}" ;;
  *) echo "terraform $*" >> "{folder}/log" ;;
esac
"""


class InfraCopy:
    """infra/ in a folder of its own, where deploys may write, and programs that stand in front of the real ones."""

    def __init__(self, folder: Path) -> None:
        self.path, self.programs_path = folder / "infra", folder / "programs"
        shutil.copytree(INFRA_PATH, self.path, ignore=_SOURCES_ONLY)
        self.programs_path.mkdir()
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_", "RAY_"))}
        self.env["PATH"] = f"{self.programs_path}:{Path(sys.executable).parent}:{self.env['PATH']}"
        self.env |= {"IMAGE_TAG": "0123456789ab", "METRICS_TOKEN_SHA256": "0" * 64, "HOME": str(folder)}

    def stand_in(self, name: str, script: str) -> None:
        path = self.programs_path / name
        path.write_text(script)
        path.chmod(0o755)

    def stand_in_outputs(self, environment: str, node_pools: str) -> None:
        """Terraform's outputs as in the overlay's example."""
        folder = self.path.parent / "outputs"
        folder.mkdir(exist_ok=True)
        example = self.path / "kubernetes" / "overlays" / environment / "platform.env.example"
        (folder / "platform_env").write_text(example.read_text())
        (folder / "node_pools_yaml").write_text(node_pools)
        self.stand_in("terraform", TERRAFORM_STAND_IN.format(folder=folder))

    def script(self, *command: str, allowed: tuple[int, ...] = (0,), **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.path / "scripts" / command[0]), *command[1:]],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=540,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode in allowed, f"{' '.join(command)}\n{done.stdout[-5000:]}{done.stderr[-5000:]}"
        return done

    def kustomize(self, environment: str) -> str:
        folder = self.path / "kubernetes" / "overlays" / environment
        return subprocess.run(
            ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60
        ).stdout


@pytest.fixture
def infra_copy(tmp_path: Path) -> InfraCopy:
    return InfraCopy(tmp_path)


@pytest.fixture(scope="session")
def facts(initialised: Terraform) -> dict[str, dict[str, Any]]:
    """Of each environment what Terraform makes of its variables, without asking AWS."""
    names = ("node_pools_yaml", "service_accounts", "system_nodes", "instance_types", "costs")
    asked = "{" + ", ".join(f"{name} = local.{name}" for name in names) + "}"
    return {env: initialised.evaluate(asked, f"-var-file=envs/{env}.tfvars") for env in ENVIRONMENTS}


@pytest.fixture(scope="session")
def overlays(tmp_path_factory: pytest.TempPathFactory, facts: dict[str, dict[str, Any]]) -> dict[str, InfraCopy]:
    """Of each environment a copy of infra/ in which infra/scripts/render.sh ran."""
    made = {}
    for environment in ENVIRONMENTS:
        made[environment] = InfraCopy(tmp_path_factory.mktemp(environment))
        made[environment].stand_in_outputs(environment, facts[environment]["node_pools_yaml"])
        made[environment].script("render.sh", environment)
    return made


@pytest.fixture(scope="session")
def rendered(overlays: dict[str, InfraCopy]) -> dict[str, str]:
    """What `kubectl apply -k` would send, of each environment."""
    return {environment: copy.kustomize(environment) for environment, copy in overlays.items()}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process for all tests of infra: they share a Terraform that is ready, and wait more than they work.

    Those that need roles come last, because these take their time to be made.
    """
    for item in items:
        if HERE_PATH in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("infra"))
    items.sort(key=lambda item: HERE_PATH in item.path.parents and "roles" in getattr(item, "fixturenames", ()))
