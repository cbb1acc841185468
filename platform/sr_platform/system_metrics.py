"""Processors, memory, disk, network and GPUs of this machine -> the run's "System metrics" page in MLflow.

    with SystemMetrics(log):      # log: the RunLog of rank 0
        train()

The figures and their names are MLflow's own. GPUs are read through pynvml (package nvidia-ml-py) where there are any.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Any

from sr_platform.run_log import Metric, RunLog

_PREFIX = "system/"

logger = logging.getLogger(__name__)


class SystemMetrics:
    """Logs a sample every `every_s` seconds, from a thread, at the largest step that `log` has seen by then."""

    def __init__(self, log: RunLog, every_s: float = 10.0) -> None:
        self._log, self._every_s = log, every_s
        self._is_stopped = threading.Event()
        self._monitors = _monitors()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the samples; none is logged after this returns."""
        self._is_stopped.set()
        self._thread.join()

    def __enter__(self) -> SystemMetrics:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        # A reading of the processors' load covers the time since the one before; the first covers nothing.
        self._read()
        while not self._is_stopped.wait(self._every_s):
            values = self._read()
            self._log.log([Metric(f"{_PREFIX}{key}", value, self._log.step) for key, value in values.items()])

    def _read(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in list(self._monitors):
            try:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            except Exception:
                logger.exception("tracking: %s fails; training goes on without it", type(monitor).__name__)
                self._monitors.remove(monitor)
        return values


def _monitors() -> list[Any]:
    """Those of MLflow's own that work here; without a GPU or pynvml, all but the one of GPUs."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        try:
            monitors.append(kind())
        except Exception as error:  # noqa: BLE001 - each has its own, and none is worth a training
            logger.info("tracking: %s is left out: %s", kind.__name__, error)
    return monitors
