"""A node's notice that it will go (spot reclaim, drain) -> checkpoint, then leave, before it is taken away.

All ranks return once the checkpoint counts, and the driver starts the stage again: Ray places nothing on a node that is
being drained. To wait until the node is gone, as Ray Train would, costs the rest of the notice; to end with an error
counts as a failure of the training.
"""

from __future__ import annotations

import logging

import ray.train

logger = logging.getLogger("pipelines.train")


class Leaving(Exception):  # noqa: N818 - no error: the way out of the loop, on all ranks alike
    """The checkpoint of `update` is committed and a node is about to go."""

    def __init__(self, update: int) -> None:
        super().__init__(f"left after update {update}")
        self.update = update


def is_told_to_leave() -> bool:
    """Whether a node of this run is about to be taken away; all ranks must ask together."""
    notice = ray.train.get_preemption_info()
    if notice is None:
        return False
    logger.warning("node %s is about to go", ", ".join(notice.preempted_node_ids))
    return True
