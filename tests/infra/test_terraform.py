"""What can be said of the configuration without applying it: form, types, validation, the cost table."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sr_platform.cluster import REPOSITORY_PATH

TERRAFORM_PATH = REPOSITORY_PATH / "infra" / "terraform"
MODULES = sorted((TERRAFORM_PATH / "modules").iterdir())
ENVIRONMENTS = ("dev", "prod")
BLOCK = re.compile(r'^(variable|output) "(\w+)" \{\n(.*?)^\}', flags=re.MULTILINE | re.DOTALL)
# One plan tells all of them: what is wrong, and what to set.
WRONG = {
    "vpc_cidr": "10.40.0.0/8",
    "api_allowed_cidrs": ["0.0.0.0/0"],
    "gpu_pools": {"serve": {"role": "serve", "instance_types": ["z9.huge"], "max_gpus": 4}},
    "node_groups": {"big": {"role": "train", "instance_types": ["p5.48xlarge"], "min_size": 3, "max_size": 1}},
    "kubernetes_version": "1.20",
}
TOLD = [
    "vpc_cidr: got '10.40.0.0/8'; set the first address of an IPv4 block of /16, /17 or /18",
    "api_allowed_cidrs: got 0.0.0.0/0; the endpoint is not opened to the world: name the networks that need it",
    "unknown instance types, or types without a GPU: z9.huge; take one of g5.2xlarge,",
    "node_groups: big has min_size 3 and max_size 1; set 0 <= min_size <= max_size",
    "kubernetes_version: got '1.20'; set a minor version of 1.32 or later",
]


def roots() -> list[Path]:
    return [TERRAFORM_PATH, TERRAFORM_PATH / "bootstrap", *MODULES]


def blocks(folder: Path, name: str) -> list[tuple[str, str, str]]:
    """(kind, name, body) of a file's variables and outputs."""
    return [match.groups() for match in BLOCK.finditer((folder / name).read_text())]


def test_files_are_formatted(terraform_config: Path, initialised: Any) -> None:
    command = ["terraform", "fmt", "-check", "-recursive", str(TERRAFORM_PATH)]
    done = subprocess.run(command, env=initialised.env, capture_output=True, text=True, timeout=60)
    assert done.stdout + done.stderr == ""


def test_the_configuration_is_valid_and_locked_for_every_platform(initialised: Any) -> None:
    assert json.loads(initialised.run("validate", "-json").stdout)["valid"] is True
    lock = (TERRAFORM_PATH / ".terraform.lock.hcl").read_text()
    assert lock == (TERRAFORM_PATH / "bootstrap" / ".terraform.lock.hcl").read_text()
    assert lock.count('"zh:') > 10, "hashes of all platforms, not of this one alone"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_every_module_has_the_same_files(module: Path) -> None:
    names = {path.name for path in module.iterdir()}
    assert names == {"README.md", "main.tf", "outputs.tf", "variables.tf", "versions.tf"}
    sources = re.findall(r'source += "\./modules/([\w-]+)"', (TERRAFORM_PATH / "main.tf").read_text())
    assert module.name in sources


@pytest.mark.parametrize("folder", roots(), ids=lambda folder: folder.name)
def test_variables_and_outputs_say_what_they_are(folder: Path) -> None:
    for kind, name, body in [*blocks(folder, "variables.tf"), *blocks(folder, "outputs.tf")]:
        assert re.search(r'^  description += ".{3,}"$', body, flags=re.MULTILINE), f"{kind} {name} has no description"
        assert kind == "output" or re.search(r"^  type += ", body, flags=re.MULTILINE), f"{name} has no type"


def test_every_variable_is_guarded_where_a_wrong_value_costs() -> None:
    free = [name for _, name, body in blocks(TERRAFORM_PATH, "variables.tf") if "validation {" not in body]
    assert free == ["single_nat_gateway", "enable_fsx"], "only a yes or no needs no validation"


def test_every_validation_has_a_failing_case() -> None:
    text = (TERRAFORM_PATH / "tests" / "variables.tftest.hcl").read_text()
    expected = re.findall(r"expect_failures = \[(.*?)\]", text, flags=re.DOTALL)
    cases = Counter(name for one in expected for name in re.findall(r"var\.(\w+)", one))
    guards = {name: body.count("validation {") for _, name, body in blocks(TERRAFORM_PATH, "variables.tf")}
    assert {name: cases[name] for name in guards} == guards


def test_a_message_says_what_came_and_what_to_set() -> None:
    for _, name, body in blocks(TERRAFORM_PATH, "variables.tf"):
        for message in re.findall(r'error_message = "(.+)"', body):
            assert message.startswith(f"{name}: "), name


def test_with_mocks_it_plans_what_it_should_and_refuses_what_it_should(initialised: Any) -> None:
    done = initialised.run("test", "-no-color")
    assert re.search(r"Success! \d+ passed, 0 failed", done.stdout), done.stdout[-2000:]


def test_wrong_values_stop_the_plan_with_what_to_set(
    make_terraform: Callable[..., Any], initialised: Any, aws: str
) -> None:
    values = initialised.folder / "wrong.tfvars.json"
    values.write_text(json.dumps(WRONG))
    initialised.env["AWS_ENDPOINT_URL"] = aws
    arguments = ("-input=false", "-no-color", "-var-file=envs/dev.tfvars", f"-var-file={values.name}")
    refused = initialised.run("plan", *arguments, allowed=(1,)).stderr
    told = re.sub(r"[\s│]+", " ", refused)
    assert [message for message in TOLD if message not in told] == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_cost_table_is_what_the_variables_give(facts: dict[str, Any], environment: str) -> None:
    page = (REPOSITORY_PATH / "infra" / "README.md").read_text()
    costs = facts[environment]["costs"]
    rows = dict(re.findall(rf"^\| {environment} \| ([\w, ]+?) \| ([\d,]+) USD", page, flags=re.MULTILINE))
    assert {name: int(usd.replace(",", "")) for name, usd in rows.items()} == {
        "always, a month": round(costs["monthly_idle_usd"]["total"]),
        "every pool full, an hour": round(costs["hourly_ceiling_usd"]["total"]),
    }


def test_no_file_holds_an_account_or_a_key() -> None:
    for path in [
        *TERRAFORM_PATH.rglob("*.tf"),
        *TERRAFORM_PATH.rglob("*.tfvars"),
        *TERRAFORM_PATH.rglob("*.tfbackend"),
    ]:
        text = path.read_text()
        assert not re.search(r"\b\d{12}\b|AKIA[0-9A-Z]{16}", text), path.name
