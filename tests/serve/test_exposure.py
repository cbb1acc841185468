"""Behind HAProxy, who is let in as a program of this machine."""

from __future__ import annotations

import pytest

from serve.access import AccessConfig
from serve.exposure import check_exposure
from serve.gateway import GatewayConfig
from serve.metrics import MetricsConfig
from sr_platform.errors import ConfigError

ANY = "0.0.0.0"  # noqa: S104 - what is tested
HERE, ELSEWHERE = "127.0.0.1", "10.0.3.7"
TRUSTING = GatewayConfig()
CLOSED = GatewayConfig(access=AccessConfig(mode="keys"), metrics=MetricsConfig(token_sha256="0" * 64))


def test_programs_of_this_machine_are_trusted_where_nobody_else_can_call() -> None:
    check_exposure(TRUSTING, http_host=HERE, node_address=HERE)


@pytest.mark.parametrize(("http_host", "node_address"), [(ANY, HERE), (ANY, ELSEWHERE), (HERE, ELSEWHERE)])
def test_otherwise_they_cannot_be_told_from_others(http_host: str, node_address: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"access\.mode is local, but .* on {http_host} and Ray on {node_address}: set"
    ):
        check_exposure(TRUSTING, http_host=http_host, node_address=node_address)


def test_metrics_are_not_open_to_everybody_by_mistake() -> None:
    untold = CLOSED.model_copy(update={"metrics": MetricsConfig()})
    with pytest.raises(ConfigError, match=r"metrics\.token_sha256 everybody could read"):
        check_exposure(untold, http_host=ANY, node_address=HERE)
    check_exposure(untold, http_host=ANY, node_address=ELSEWHERE)  # everybody is refused


def test_what_trusts_nobody_may_be_called_from_anywhere() -> None:
    check_exposure(CLOSED, http_host=ANY, node_address=HERE)
    check_exposure(CLOSED, http_host=ANY, node_address=ELSEWHERE)
