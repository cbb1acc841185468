"""Metrics of one process in Prometheus' form, and of all processes of a Ray cluster together behind one address.

A process counts in `REGISTRY`, which costs about a microsecond and waits for nobody. `Shared(name).start()` lays what
it holds into the key-value store of the cluster every two seconds, from a thread of its own; `exposition(name)` is this
process and all others, each series with the label `replica`. Without Ray it is this process alone.

Ray's own agents (ray.util.metrics) were not taken: in Ray 2.60 a gauge is gone once it was not set again for two
exports, a histogram's sum is guessed from its buckets, a counter cannot start at zero, and a scrape of one node brings
half a megabyte of Ray's own.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REGISTRY = CollectorRegistry()
"""Of this process."""

_NAMESPACE = b"sr_platform_metrics"
_SHARE_EVERY_S = 2.0
# What a process that ended has in hand is nothing; what it has counted, the next scrapes still shall see.
_GAUGES_LAST_S = 15.0
_COUNTERS_LAST_S = 300.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What one process had counted `age_s` ago, as Prometheus text."""

    process: str
    age_s: float
    text: str


class Shared:
    """Lays the metrics of this process where every other one of the cluster can read them."""

    def __init__(self, process: str, registry: CollectorRegistry = REGISTRY, every_s: float = _SHARE_EVERY_S) -> None:
        self._process, self._registry, self._every_s = process, registry, every_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Begins; call it in a process that is connected to Ray."""
        self._thread.start()

    def stop(self) -> None:
        """Lays down what was counted last, and ends."""
        self._stopping.set()
        self._thread.join(self._every_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._share()
            self._stopping.wait(self._every_s)
        self._share()

    def _share(self) -> None:
        from ray.experimental import internal_kv

        text = generate_latest(self._registry).decode()
        try:
            value = json.dumps({"at_s": time.time(), "text": text}).encode()
            internal_kv._internal_kv_put(self._process.encode(), value, overwrite=True, namespace=_NAMESPACE)
        except Exception as error:  # noqa: BLE001 - whatever Ray has, counting must not end the service
            logger.warning("metrics: %s could not be shared, which is tried again: %s", self._process, error)


def exposition(process: str, registry: CollectorRegistry = REGISTRY) -> bytes:
    """All that is known of this process and of those that share theirs, as one text for Prometheus."""
    own = Snapshot(process, 0.0, generate_latest(registry).decode())
    return merged([own, *(other for other in shared_snapshots() if other.process != process)])


def merged(snapshots: Iterable[Snapshot]) -> bytes:
    """One text of many processes, told apart by the label `replica`; gauges of those that fell silent are left out."""
    families: dict[str, Metric] = {}
    for snapshot in snapshots:
        for family in text_string_to_metric_families(snapshot.text):
            is_stale = family.type == "gauge" and snapshot.age_s > _GAUGES_LAST_S
            if is_stale or family.name.endswith("_created"):
                continue
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {"replica": snapshot.process, **sample.labels}
                into.add_sample(sample.name, labels, sample.value)
    return generate_latest(_Families(families.values()))


def shared_snapshots() -> list[Snapshot]:
    """What processes of the cluster have shared; what nobody has renewed for long is removed. Empty without Ray."""
    import ray

    if not ray.is_initialized():
        return []
    from ray.experimental import internal_kv

    snapshots = []
    for key in internal_kv._internal_kv_list(b"", namespace=_NAMESPACE):
        value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        if value is None:
            continue
        shared = json.loads(value)
        snapshot = Snapshot(key.decode(), time.time() - shared["at_s"], shared["text"])
        if snapshot.age_s < _COUNTERS_LAST_S:
            snapshots.append(snapshot)
        else:
            internal_kv._internal_kv_del(key, namespace=_NAMESPACE)
    return snapshots


class _Families(CollectorRegistry):
    """Metric families as generate_latest() takes them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__()
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
