"""Tells Ray that this pod's node is about to go, and waits until the work has left it: the preStop hook of workers.

    python infra/images/leave_cluster.py SECONDS

A spot notice becomes, through Karpenter, the eviction of the pods on that node; so does any drain of a node. Ray
places nothing new on a draining node, Ray Train saves a checkpoint within seconds and goes on elsewhere, and Ray Serve
moves its replicas. Without this, Ray would learn of it when the processes are gone.
"""

from __future__ import annotations

import sys
import time

import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util import get_node_ip_address

_LOOK_EVERY_S = 1.0


def own_node(nodes: list[dict[str, object]], ip_address: str) -> str | None:
    """The id of the living node with that address."""
    found = [str(node["NodeID"]) for node in nodes if node["Alive"] and node["NodeManagerAddress"] == ip_address]
    return found[0] if found else None


def leave(address: str, node_id: str, seconds: float) -> bool:
    """Announces the end of the node in `seconds`; False when Ray refuses."""
    deadline_ms = int((time.time() + seconds) * 1000)
    client = GcsClient(address=address)
    accepted, refusal = client.drain_node(
        node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "the pod is being evicted", deadline_ms
    )
    print(f"leave_cluster: {'draining' if accepted else 'refused: ' + refusal}", flush=True)
    return bool(accepted)


def main(seconds: float) -> None:
    ray.init(address="auto", log_to_driver=False, configure_logging=False)
    ip_address = get_node_ip_address()
    node_id = own_node(ray.nodes(), ip_address)
    if node_id is None or not leave(ray.get_runtime_context().gcs_address, node_id, seconds):
        return
    give_up_s = time.monotonic() + seconds
    # The raylet ends once nothing runs on it; this hook must not outlive it, or the pod would wait for nothing.
    while time.monotonic() < give_up_s and own_node(ray.nodes(), ip_address) == node_id:
        time.sleep(_LOOK_EVERY_S)


if __name__ == "__main__":
    main(float(sys.argv[1]))
