from __future__ import annotations

import logging
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from mlflow.system_metrics.metrics import gpu_monitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

from sr_platform.run_log import Metric, RunLog
from sr_platform.system_metrics import SystemMetrics

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def log():
    log = RunLog(NOWHERE, "0" * 32)
    yield log
    log.close()


def sampled(log: RunLog) -> dict[str, float]:
    """The first sample of every system metric, after two were taken."""
    with SystemMetrics(log, every_s=0.05):
        deadline_s = time.monotonic() + 20
        while sum(entry["key"] == "system/cpu_utilization_percentage" for entry in log.pending()) < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    entries = [entry for entry in log.pending() if entry["key"].startswith("system/")]
    return {entry["key"]: entry["value"] for entry in reversed(entries)}


def test_the_machine_is_sampled_under_mlflows_names_at_the_step_of_training(log: RunLog) -> None:
    log.log([Metric("train/loss", 1.0, 7)])
    values = sampled(log)
    assert values.keys() >= {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
        "system/disk_usage_percentage",
        "system/disk_usage_megabytes",
        "system/disk_available_megabytes",
        "system/network_receive_megabytes",
        "system/network_transmit_megabytes",
    }
    assert 0 < values["system/system_memory_usage_percentage"] < 100
    assert {entry["step"] for entry in log.pending()} == {7}
    assert "system-metrics" not in {thread.name for thread in threading.enumerate()}


class FakeNvml:
    """One GPU of 80 GB, a quarter full, at half its power."""

    NVMLError = RuntimeError
    nvmlInit = staticmethod(lambda: None)  # noqa: N815
    nvmlDeviceGetCount = staticmethod(lambda: 1)  # noqa: N815
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)  # noqa: N815
    nvmlDeviceGetMemoryInfo = staticmethod(lambda _: SimpleNamespace(used=20e9, total=80e9))  # noqa: N815
    nvmlDeviceGetUtilizationRates = staticmethod(lambda _: SimpleNamespace(gpu=97))  # noqa: N815
    nvmlDeviceGetPowerUsage = staticmethod(lambda _: 350_000)  # noqa: N815
    nvmlDeviceGetEnforcedPowerLimit = staticmethod(lambda _: 700_000)  # noqa: N815


def test_gpus_are_sampled_where_there_are_any(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml)
    monkeypatch.setattr(gpu_monitor, "pynvml", FakeNvml, raising=False)
    values = sampled(log)
    assert values["system/gpu_0_utilization_percentage"] == 97
    assert values["system/gpu_0_memory_usage_megabytes"] == 20_000
    assert values["system/gpu_0_memory_usage_percentage"] == 25


def test_a_machine_without_gpus_or_network_counters_is_sampled_all_the_same(log, monkeypatch, caplog) -> None:
    def fail() -> None:
        raise OSError("no such file")

    caplog.set_level(logging.INFO, "sr_platform")
    monkeypatch.setattr("psutil.net_io_counters", fail)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    assert {key.split("_")[0] for key in sampled(log)} == {"system/cpu", "system/system", "system/disk"}
    assert "NetworkMonitor is left out: no such file" in caplog.text
    assert "GPUMonitor is left out" in caplog.text


def test_what_cannot_be_read_is_named_once_and_left_out(log, monkeypatch, caplog) -> None:
    def fail(_: CPUMonitor) -> None:
        raise RuntimeError("no such counter")

    monkeypatch.setattr(CPUMonitor, "collect_metrics", fail)
    with SystemMetrics(log, every_s=0.01):
        deadline_s = time.monotonic() + 20
        while len(log.pending()) < 20:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    assert {entry["key"].split("_")[0] for entry in log.pending()} == {"system/disk", "system/network"}
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "CPUMonitor fails" in errors[0].getMessage()
