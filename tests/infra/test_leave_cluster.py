"""The preStop hook of workers: Ray learns that a node is about to go, while there is still time."""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable
from typing import Any

import pytest

from sr_platform.cluster import REPOSITORY_PATH

SCRIPT = runpy.run_path(str(REPOSITORY_PATH / "infra" / "images" / "leave_cluster.py"))


@pytest.fixture
def two_nodes(make_cluster: Callable[..., Any]) -> Any:
    return make_cluster(1)


@pytest.mark.ray
def test_a_node_that_announces_its_end_is_given_nothing_new(two_nodes: Any) -> None:
    from ray._raylet import GcsClient

    [worker] = two_nodes.worker_nodes
    assert SCRIPT["leave"](two_nodes.address, worker.node_id, 60.0)
    client = GcsClient(address=two_nodes.address)
    give_up_s = time.monotonic() + 30
    # An idle node leaves at once: it is draining or gone, and either way no longer offered.
    while any(
        key.hex() == worker.node_id and info.state == 0 and not info.is_head_node
        for key, info in client.get_all_node_info().items()
    ):
        if time.monotonic() > give_up_s:
            pytest.fail("the node is still offered")
        time.sleep(0.2)


def test_a_node_is_found_by_its_address_and_only_while_it_lives() -> None:
    nodes = [
        {"NodeID": "gone", "Alive": False, "NodeManagerAddress": "10.0.0.7"},
        {"NodeID": "other", "Alive": True, "NodeManagerAddress": "10.0.0.8"},
        {"NodeID": "here", "Alive": True, "NodeManagerAddress": "10.0.0.7"},
    ]
    assert SCRIPT["own_node"](nodes, "10.0.0.7") == "here"
    assert SCRIPT["own_node"](nodes, "10.0.0.9") is None
