"""What is off by default, added to an overlay as its first lines say: it renders, and goes with what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import NO_SCHEMAS, Schemas, load_all, schemas_path

from sr_platform.cluster import REPOSITORY_PATH

COMPONENTS = sorted(path.name for path in (REPOSITORY_PATH / "infra" / "kubernetes" / "components").iterdir())
CERTIFICATE = "arn:aws:acm:us-west-2:123456789012:certificate/0"


@pytest.fixture
def with_component(infra_copy: Any, facts: dict[str, Any]) -> Callable[..., Any]:
    """`with_component("captioner")`: a copy of infra/ whose overlay dev names it, before render.sh."""

    def make(name: str) -> Any:
        infra_copy.stand_in_outputs("dev", facts["dev"]["node_pools_yaml"])
        overlay: Path = infra_copy.path / "kubernetes" / "overlays" / "dev" / "kustomization.yaml"
        overlay.write_text(overlay.read_text() + f"components: [../../components/{name}]\n")
        return infra_copy

    return make


def added(with_it: str, without: str) -> list[dict[str, Any]]:
    known = {(document["kind"], document["metadata"]["name"]) for document in load_all(without)}
    return [d for d in load_all(with_it) if (d["kind"], d["metadata"]["name"]) not in known]


@NO_SCHEMAS
@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_adds_objects_that_their_schemas_allow(
    with_component: Callable[..., Any], rendered: dict[str, str], name: str
) -> None:
    copy = with_component(name)
    copy.script("render.sh", "dev", CERTIFICATE_ARN=CERTIFICATE)
    new, schemas = added(copy.kustomize("dev"), rendered["dev"]), Schemas(schemas_path())
    assert len(new) == 2
    assert [error for document in new for error in schemas.errors_of(document)] == []


def test_the_captioner_finds_its_account_and_priority(
    with_component: Callable[..., Any], rendered: dict[str, str]
) -> None:
    copy = with_component("captioner")
    copy.script("render.sh", "dev")
    (deployment,) = [d for d in added(copy.kustomize("dev"), rendered["dev"]) if d["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    known = {(document["kind"], document["metadata"]["name"]) for document in load_all(rendered["dev"])}
    assert {("ServiceAccount", pod["serviceAccountName"]), ("PriorityClass", pod["priorityClassName"])} <= known


def test_the_endpoint_carries_its_certificate_and_without_one_nothing_is_rendered(
    with_component: Callable[..., Any], rendered: dict[str, str]
) -> None:
    copy = with_component("internal-endpoint")
    refused = copy.script("render.sh", "dev", allowed=(2,))
    assert "CERTIFICATE_ARN" in refused.stderr
    assert not (copy.path / "kubernetes" / "overlays" / "dev" / "platform.env").exists()
    copy.script("render.sh", "dev", CERTIFICATE_ARN=CERTIFICATE)
    (service,) = [d for d in added(copy.kustomize("dev"), rendered["dev"]) if d["kind"] == "Service"]
    annotations = service["metadata"]["annotations"]
    assert annotations["service.beta.kubernetes.io/aws-load-balancer-ssl-cert"] == CERTIFICATE
