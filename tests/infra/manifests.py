"""Kubernetes objects against their schemas, as strictly as an API server that refuses unknown fields.

Core kinds: the schemas in PyPI's kubernetes-validate. Custom kinds: the schemas of their definitions, slimmed to JSON
files {"group", "kind", "versions": [{"name", "schema"}]} named after the plural. CEL rules are not looked at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from sr_platform.cluster import REPOSITORY_PATH

KUBERNETES_VERSION = "1.33"
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def schemas_path() -> Path | None:
    """Definitions of others, which are no part of this repository."""
    candidates = [REPOSITORY_PATH / "shared" / "crds", REPOSITORY_PATH.parent / "shared" / "crds"]
    return next((path for path in candidates if path.is_dir()), None)


NO_SCHEMAS_REASON = "no shared/crds: schemas of KubeRay and Karpenter are no part of this repository, nor of a package"
NO_SCHEMAS = pytest.mark.skipif(schemas_path() is None, reason=NO_SCHEMAS_REASON)


def load_all(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.load_all(text, Loader) if document]


def strict(schema: Any) -> Any:
    """A structural schema as a JSON schema that refuses unknown fields."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {
        key: value for key, value in schema.items() if not key.startswith("x-") and key not in ("default", "format")
    }
    if "properties" in made:
        made["properties"] = {name: strict(one) for name, one in made["properties"].items()}
        if "additionalProperties" not in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties", "not"):
        if isinstance(made.get(key), dict):
            made[key] = strict(made[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in made:
            made[key] = [{k: v for k, v in one.items() if not k.startswith("x-")} for one in made[key]]
    if made.pop("nullable", False):
        made["type"] = [made["type"], "null"]
    return made


class Schemas:
    """`Schemas().errors_of(document)` in words; the custom kinds by (apiVersion, kind) in `custom`."""

    def __init__(self, folder: Path | None) -> None:
        self.custom: dict[tuple[str, str], Any] = {}
        self.plurals: dict[tuple[str, str], str] = {}
        for path in sorted(folder.glob("*.json")) if folder else []:
            definition = json.loads(path.read_text())
            for version in definition["versions"]:
                schema = strict(version["schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                key = (f"{definition['group']}/{version['name']}", definition["kind"])
                self.custom[key] = jsonschema.Draft202012Validator(schema)
                self.plurals[key] = path.stem

    def errors_of(self, document: dict[str, Any]) -> list[str]:
        validator = self.custom.get((document["apiVersion"], document["kind"]))
        if validator is not None:
            return [
                f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(document)
            ]
        try:
            kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            return [f"no schema for {document['apiVersion']} {document['kind']}"]
        except kubernetes_validate.ValidationError as error:
            return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}"]
        return []
