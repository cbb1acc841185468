"""A Kubernetes API just wide enough for kubectl apply --server-side, create, get and delete, on loopback.

Every object is checked against its schema, so that a typo is refused as a server refuses it. Nothing runs.
"""

from __future__ import annotations

import base64
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml
from manifests import Schemas

# (group/version, kind) -> (plural, whether it lies in a namespace)
CORE = {
    ("v1", "Namespace"): ("namespaces", False),
    ("v1", "ConfigMap"): ("configmaps", True),
    ("v1", "Secret"): ("secrets", True),
    ("v1", "Service"): ("services", True),
    ("v1", "ServiceAccount"): ("serviceaccounts", True),
    ("v1", "ResourceQuota"): ("resourcequotas", True),
    ("v1", "PersistentVolumeClaim"): ("persistentvolumeclaims", True),
    ("apps/v1", "Deployment"): ("deployments", True),
    ("apps/v1", "DaemonSet"): ("daemonsets", True),
    ("policy/v1", "PodDisruptionBudget"): ("poddisruptionbudgets", True),
    ("scheduling.k8s.io/v1", "PriorityClass"): ("priorityclasses", False),
    ("networking.k8s.io/v1", "NetworkPolicy"): ("networkpolicies", True),
}
BUILT_IN_NAMESPACES = ("default", "kube-system")
VERBS = ["get", "list", "patch", "create", "delete"]


@dataclass(frozen=True)
class Place:
    """What a path names: a kind, maybe in a namespace, maybe one object."""

    version: str
    kind: str
    namespace: str | None
    name: str | None


class Cluster:
    """The objects, and what was done in which order."""

    def __init__(self, schemas: Schemas) -> None:
        self.schemas = schemas
        self.kinds = dict(CORE)
        for key, plural in schemas.plurals.items():
            self.kinds[key] = (plural, not key[0].startswith("karpenter"))
        self.objects: dict[Place, dict[str, Any]] = {}
        self.log: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()

    def versions(self) -> list[str]:
        return list(dict.fromkeys(version for version, _ in self.kinds))

    def of_kind(self, kind: str) -> dict[str, dict[str, Any]]:
        return {place.name or "": made for place, made in self.objects.items() if place.kind == kind}

    def place(self, path: str) -> Place | None:
        parts = path.strip("/").split("/")
        version, rest = ("v1", parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        namespace = None
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        kind = next((k for (v, k), (plural, _) in self.kinds.items() if v == version and plural == rest[0]), None)
        return None if kind is None else Place(version, kind, namespace, rest[1] if len(rest) > 1 else None)

    def read(self, place: Place) -> tuple[int, dict[str, Any]]:
        if place.name is not None:
            return (200, self.objects[place]) if place in self.objects else not_found(place)
        found = [
            made
            for at, made in self.objects.items()
            if (at.version, at.kind) == (place.version, place.kind) and place.namespace in (None, at.namespace)
        ]
        return 200, {"kind": f"{place.kind}List", "apiVersion": place.version, "metadata": {}, "items": found}

    def write(self, place: Place, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        place = Place(place.version, place.kind, place.namespace, document["metadata"]["name"])
        namespace = Place("v1", "Namespace", None, place.namespace)
        if place.namespace not in (None, *BUILT_IN_NAMESPACES) and namespace not in self.objects:
            return failure(404, "NotFound", f'namespaces "{place.namespace}" not found')
        if errors := self.schemas.errors_of(document):
            return failure(422, "Invalid", f"{place.kind} {place.name} is invalid: {'; '.join(errors)}")
        self.log.append(("apply", place.kind, place.name or ""))
        document["metadata"].update(uid=f"uid-{len(self.log)}", resourceVersion=str(len(self.log)))
        known = place in self.objects
        self.objects[place] = document
        return (200 if known else 201), document

    def delete(self, place: Place) -> tuple[int, dict[str, Any]]:
        if place not in self.objects:
            return not_found(place)
        self.log.append(("delete", place.kind, place.name or ""))
        return 200, self.objects.pop(place)


def failure(code: int, reason: str, message: str) -> tuple[int, dict[str, Any]]:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message}
    return code, {**body, "code": code}


def not_found(place: Place) -> tuple[int, dict[str, Any]]:
    return failure(404, "NotFound", f'{place.kind} "{place.name}" not found')


def discovery(cluster: Cluster, path: str) -> dict[str, Any] | None:
    """What kubectl asks before it asks for anything."""
    if path == "/version":
        return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups: dict[str, list[dict[str, str]]] = {}
        for version in cluster.versions():
            if "/" in version:
                group, short = version.split("/")
                groups.setdefault(group, []).append({"groupVersion": version, "version": short})
        listed = [{"name": name, "versions": found, "preferredVersion": found[0]} for name, found in groups.items()]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    if path == "/openapi/v3":
        paths = [f"api/{v}" if v == "v1" else f"apis/{v}" for v in cluster.versions()]
        return {"paths": {one: {"serverRelativeURL": f"/openapi/v3/{one}"} for one in paths}}
    if path.startswith("/openapi/v3/"):
        return field_validation(cluster, path.removeprefix("/openapi/v3/").split("/", 1)[1])
    version = path.strip("/").split("/", 1)[1] if path.startswith(("/api/", "/apis/")) else ""
    if version not in cluster.versions():
        return None
    resources = [
        {"name": plural, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": VERBS}
        for (of_version, kind), (plural, namespaced) in cluster.kinds.items()
        if of_version == version
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def field_validation(cluster: Cluster, version: str) -> dict[str, Any]:
    """Tells kubectl that the server itself checks the fields of every kind."""
    group, _, short = version.rpartition("/")
    parameters = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
    paths = {}
    for (of_version, kind), (plural, _) in cluster.kinds.items():
        if of_version == version:
            of_kind = {"group": group, "version": short, "kind": kind}
            operation = {"parameters": parameters, "responses": {}, "x-kubernetes-group-version-kind": of_kind}
            paths[f"/x/{plural}"] = {"patch": operation}
    return {"openapi": "3.0.0", "info": {"title": "fake", "version": "1"}, "paths": paths}


def handler_of(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

        def answer(self) -> None:
            path = urllib.parse.urlparse(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with cluster.lock:
                code, made = self.made(path, body)
            data = json.dumps(made).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def made(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
            if (found := discovery(cluster, path)) is not None:
                return 200, found
            place = cluster.place(path)
            if place is None:
                return failure(404, "NotFound", f"no such API: {path}")
            if self.command == "GET":
                return cluster.read(place)
            if self.command == "DELETE":
                return cluster.delete(place)
            return cluster.write(place, stored(yaml.safe_load(body)))

        do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 - http.server's names

    return Handler


def stored(document: dict[str, Any]) -> dict[str, Any]:
    """As a server keeps it: a secret's stringData becomes data."""
    plain = document.pop("stringData", {})
    if plain:
        document.setdefault("data", {}).update({k: base64.b64encode(v.encode()).decode() for k, v in plain.items()})
    return document


@contextmanager
def running(schemas: Schemas) -> Iterator[tuple[str, Cluster]]:
    """Its URL, and what lies in it."""
    cluster = Cluster(schemas)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(cluster))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
