from __future__ import annotations

import json
import time

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sr_platform import metrics
from sr_platform.metrics import Shared, Snapshot, exposition, merged, shared_snapshots


class Counted:
    """A process's metrics, small."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.steps = Counter("faithdiff_steps", "Steps", ("size_class",), registry=self.registry)
        self.waits = Histogram("faithdiff_queue_seconds", "Waits", buckets=(1, 10), registry=self.registry)
        self.entries = Gauge("faithdiff_entries", "In hand", registry=self.registry)

    def snapshot(self, process: str, age_s: float = 0.0) -> Snapshot:
        return Snapshot(process, age_s, generate_latest(self.registry).decode())


def samples(text: bytes) -> dict[tuple[str, str], float]:
    """(name, replica) -> value, of an exposition that holds each once."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name + sample.labels.get("le", ""), sample.labels.get("replica", ""))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def test_processes_stand_side_by_side_with_exact_values() -> None:
    one, other = Counted(), Counted()
    one.steps.labels("small").inc(2)
    other.steps.labels("small").inc(40)
    one.waits.observe(0.25)
    one.waits.observe(77)
    one.entries.set(3)
    text = merged([one.snapshot("a"), other.snapshot("b")])
    found = samples(text)
    assert (found["faithdiff_steps_total", "a"], found["faithdiff_steps_total", "b"]) == (2, 40)
    assert (found["faithdiff_queue_seconds_bucket1.0", "a"], found["faithdiff_queue_seconds_bucket+Inf", "a"]) == (1, 2)
    assert found["faithdiff_queue_seconds_sum", "a"] == 77.25
    assert found["faithdiff_entries", "a"] == 3
    assert text.count(b"# TYPE faithdiff_steps_total counter") == 1
    assert b"_created" not in text


def test_of_a_process_that_fell_silent_counters_stay_and_gauges_go() -> None:
    counted = Counted()
    counted.steps.labels("small").inc(2)
    counted.entries.set(3)
    found = samples(merged([counted.snapshot("a", age_s=60)]))
    assert found["faithdiff_steps_total", "a"] == 2
    assert not any(name == "faithdiff_entries" for name, _ in found)


def test_without_ray_there_is_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    counted = Counted()
    counted.steps.labels("small").inc()
    assert {replica for _, replica in samples(exposition("local", counted.registry))} == {"local"}


@pytest.mark.ray
class TestOnACluster:
    @pytest.fixture(autouse=True)
    def own_names(self, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing of other tests is seen."""
        monkeypatch.setattr(metrics, "_NAMESPACE", f"test-{time.time_ns()}".encode())

    def test_what_another_process_shares_is_seen_and_outlives_it(self) -> None:
        import ray

        @ray.remote(num_cpus=0.1)
        def count(namespace: bytes) -> None:
            from prometheus_client import CollectorRegistry, Counter

            from sr_platform import metrics

            metrics._NAMESPACE = namespace
            registry = CollectorRegistry()
            shared = metrics.Shared("worker", registry, every_s=0.05)
            shared.start()
            Counter("faithdiff_steps", "Steps", registry=registry).inc(7)
            shared.stop()

        ray.get(count.remote(metrics._NAMESPACE))
        own = Counted()
        own.steps.labels("small").inc(1)
        found = samples(exposition("gateway", own.registry))
        assert (found["faithdiff_steps_total", "worker"], found["faithdiff_steps_total", "gateway"]) == (7, 1)

    def test_it_is_renewed_while_the_process_counts_on(self) -> None:
        counted = Counted()
        shared = Shared("me", counted.registry, every_s=0.05)
        shared.start()
        try:
            for wanted in (5, 10):
                counted.steps.labels("small").inc(5)
                give_up_s = time.monotonic() + 10
                while f"{wanted}.0" not in "".join(s.text for s in shared_snapshots()):
                    assert time.monotonic() < give_up_s
                    time.sleep(0.02)
        finally:
            shared.stop()

    def test_what_nobody_has_renewed_for_long_is_removed(self) -> None:
        from ray.experimental import internal_kv

        old = json.dumps({"at_s": time.time() - 3600, "text": ""}).encode()
        internal_kv._internal_kv_put(b"gone", old, namespace=metrics._NAMESPACE)
        assert shared_snapshots() == []
        assert internal_kv._internal_kv_get(b"gone", namespace=metrics._NAMESPACE) is None
