"""Makes a replica of Ray Serve visible: its name in every line of its log, its metrics shared, its spans collected."""

from __future__ import annotations

from serve.tracing import export_spans
from sr_platform.metrics import Shared
from sr_platform.observability import LogConfig, configure_logging


def make_visible(log: LogConfig) -> str:
    """Call it first in the constructor of a deployment; the name of this replica comes back, such as Restorer#f3k2.

    Raises:
        sr_platform.errors.ConfigError: a collector of spans is set that cannot be reached with what is installed.
    """
    from ray import serve

    replica = serve.get_replica_context().replica_id
    deployment = str(replica.deployment_id.name)
    name = f"{deployment}#{replica.unique_id}"
    configure_logging(log.level, form=log.form, fields={"replica": name})
    export_spans(f"faithdiff-{deployment.lower()}")
    Shared(name).start()
    return name
