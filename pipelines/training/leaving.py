"""A node's notice that it will go -> checkpoint, then leave, before it is taken away."""

from __future__ import annotations

import logging
import os

import ray
import ray.train

logger = logging.getLogger("pipelines.train")


class Preemption:
    """Whether a node of this run is about to be reclaimed (spot notice, drain); all ranks must ask together."""

    def __init__(self) -> None:
        self._info: ray.train.PreemptionInfo | None = None

    def is_announced(self) -> bool:
        """True once for every notice."""
        info = ray.train.get_preemption_info()
        if info is None or info == self._info:
            return False
        self._info = info
        return True

    def leave(self, update: int) -> None:
        """Ends this process if its node is the one that goes; the rest of the run starts again without it.

        Call it once the checkpoint is committed. Ray counts the death of a worker on a draining node as a preemption,
        not as a failure, and does not wait for the notice to run out.
        """
        assert self._info is not None
        node_id = ray.get_runtime_context().get_node_id()
        logger.warning("node %s will go; update %d is safe", ", ".join(self._info.preempted_node_ids), update)
        if node_id in self._info.preempted_node_ids:
            logging.shutdown()
            os._exit(0)
