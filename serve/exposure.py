"""Whether a gateway still knows who calls, where HAProxy is Ray Serve's way in (RAY_SERVE_ENABLE_HA_PROXY=1).

HAProxy does not tell: every request comes from the address of the node that it runs on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.access import is_loopback
from sr_platform.errors import ConfigError

if TYPE_CHECKING:
    from serve.gateway import GatewayConfig


def check_exposure(cfg: GatewayConfig, *, http_host: str, node_address: str) -> None:
    """Of a gateway behind HAProxy, which listens on `http_host`; `node_address` is Ray's of this node.

    Raises:
        ConfigError: what is meant for this machine alone would be open to others, or to nobody.
    """
    if is_loopback(http_host) and is_loopback(node_address):
        return  # nobody else can call
    came = f"behind HAProxy nobody sees who calls, Serve listens on {http_host} and Ray on {node_address}"
    if cfg.access.mode == "local":
        raise ConfigError(
            f"gateway: access.mode is local, but {came}: set it to keys or open, have both listen on 127.0.0.1, or "
            "unset RAY_SERVE_ENABLE_HA_PROXY"
        )
    if cfg.metrics.token_sha256 is None and is_loopback(node_address):
        raise ConfigError(f"gateway: without metrics.token_sha256 everybody could read /metrics, for {came}: set it")
