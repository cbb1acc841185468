"""How many restorers there should be: enough to work off what waits within a set time, none where nothing waits."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from serve.jobs import JobStore
from sr_platform.config import StrictConfig

_LOOK_EVERY_S = 1.0

logger = logging.getLogger(__name__)


class AutoscalingConfig(StrictConfig):
    """Replicas between a minimum and a maximum, by the work that waits."""

    min_replicas: NonNegativeInt = 0
    """Replicas that are always there; 0 lets the last one go when nothing waits."""
    max_replicas: PositiveInt = 4
    """Replicas at most."""
    drain_s: PositiveFloat = 30.0
    """There are as many replicas as it takes to work off what waits in so many seconds."""
    megapixel_steps_per_s: PositiveFloat = Field(default=1.0)
    """What one replica does in a second, assumed until replicas have measured it: output megapixels x steps."""
    upscale_delay_s: NonNegativeFloat = 5.0
    """More replicas are wanted for so long before they are started; from zero the first one starts at once."""
    downscale_delay_s: NonNegativeFloat = 120.0
    """Fewer replicas are enough for so long before one is stopped."""
    downscale_to_zero_delay_s: NonNegativeFloat = 600.0
    """The same for the last one, which the next picture would have to wait for."""


class QueuedWork:
    """Ray Serve's autoscaling policy: called with its context about every tenth of a second, in its controller."""

    def __init__(
        self, *, store_url: str, drain_s: float, megapixel_steps_per_s: float, megapixels_of_one: float
    ) -> None:
        self._store = JobStore(store_url)
        self._drain_s, self._assumed_rate = drain_s, megapixel_steps_per_s
        self._megapixels_of_one = megapixels_of_one
        self._looked_s, self._wanted = -math.inf, 0

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """(replicas wanted, nothing to remember); Ray adds delays and bounds."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            self._wanted = self._look(ctx.target_num_replicas)
        # Pictures whose senders wait on the connection are in no table.
        waiting_on_connection = int(ctx.total_num_requests > 0)
        return max(self._wanted, waiting_on_connection), {}

    def _look(self, current: int) -> int:
        try:
            backlog, replicas = self._store.backlog(), self._store.replicas()
        except Exception:
            logger.exception("autoscaling: the job database does not answer; the number of replicas stays")
            return current
        rates = [rate for replica in replicas if (rate := replica.get("megapixel_steps_per_s"))]
        rate = sum(rates) / len(rates) if rates else self._assumed_rate
        num_jobs = backlog.num_queued + backlog.num_running
        # A picture that is spread keeps several replicas busy.
        return wanted_replicas(
            backlog.work, num_jobs + int(backlog.megapixels / self._megapixels_of_one), rate, self._drain_s
        )


def wanted_replicas(work: float, most: int, rate: float, drain_s: float) -> int:
    """Replicas that work off `work` megapixel-steps in `drain_s` at `rate` each; one at least where there is work.

    More than `most` would find nothing to do.
    """
    return min(most, max(1, math.ceil(work / (rate * drain_s))))
