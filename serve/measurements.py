"""What the service counts, in Prometheus' form: the metrics, and a function for everything that is worth counting.

Each function counts in this process and costs a few microseconds; `serve.metrics` shows all processes together. Label
values come from short lists: routes, size classes, states, kinds of problems; never a key or a job.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram, ProcessCollector

from sr_platform.metrics import REGISTRY

# Upper bounds in megapixels of the result.
_SIZE_CLASSES = (("small", 1.0), ("medium", 8.0), ("large", 32.0))
SIZE_CLASSES = (*(name for name, _ in _SIZE_CLASSES), "huge")
NO_SIZE = "none"
_NO_CAUSE = "none"
_WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_PASSES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

ProcessCollector(namespace="faithdiff", registry=REGISTRY)
_REQUEST_SECONDS = Histogram(
    "faithdiff_request_seconds",
    "From a request to the first byte of its answer, by route and size of the result",
    ("route", "size_class"),
    buckets=_WAITS_S,
    registry=REGISTRY,
)
_REQUESTS = Counter("faithdiff_requests", "Answers by route and HTTP status", ("route", "status"), registry=REGISTRY)
_UPLOAD_BYTES = Counter("faithdiff_upload_bytes", "Bytes of pictures that were sent", registry=REGISTRY)
_REFUSALS = Counter(
    "faithdiff_refusals", "Requests told to come again later, by reason", ("reason",), registry=REGISTRY
)
_WEBHOOKS = Counter("faithdiff_webhooks", "Webhook calls by outcome", ("outcome",), registry=REGISTRY)
_QUEUE_SECONDS = Histogram(
    "faithdiff_queue_seconds",
    "From acceptance to the first work on a picture",
    ("size_class",),
    buckets=_WAITS_S,
    registry=REGISTRY,
)
_PICTURE_SECONDS = Histogram(
    "faithdiff_picture_seconds",
    "From acceptance to the end, of pictures that were restored",
    ("size_class",),
    buckets=_WAITS_S,
    registry=REGISTRY,
)
_PICTURES = Counter(
    "faithdiff_pictures",
    "Pictures by end state and by the problem of those that failed",
    ("state", "cause"),
    registry=REGISTRY,
)
_TAKEOVERS = Counter("faithdiff_takeovers", "Jobs taken over from a replica that was lost", registry=REGISTRY)
_PIXELS = Counter("faithdiff_pixels", "Pixels of results", registry=REGISTRY)
_DEVICE_SECONDS = Counter(
    "faithdiff_device_seconds", "Seconds a device worked on pictures, by phase: the cost", ("phase",), registry=REGISTRY
)
_PASS_SECONDS = Histogram(
    "faithdiff_pass_seconds",
    "Duration of one denoising pass over a batch of tiles",
    buckets=_PASSES_S,
    registry=REGISTRY,
)
_STEPS = Counter("faithdiff_steps", "Denoising steps, each of one picture", registry=REGISTRY)
_MEGAPIXEL_STEPS = Counter("faithdiff_megapixel_steps", "Denoising steps x megapixels of the result", registry=REGISTRY)
_TILES = Counter("faithdiff_batch_tiles", "Tiles in the batches that ran", registry=REGISTRY)
_SLOTS = Counter("faithdiff_batch_slots", "Tiles that would have fitted into these batches", registry=REGISTRY)
_ENTRIES = Gauge("faithdiff_entries", "Pictures in hand, by phase", ("phase",), registry=REGISTRY)
_MEGAPIXELS = Gauge("faithdiff_megapixels_in_hand", "Megapixels of results being made", registry=REGISTRY)
_FREE_MEGAPIXELS = Gauge("faithdiff_megapixels_free", "Megapixels of results there is room for", registry=REGISTRY)
_GPU_USED = Gauge("faithdiff_gpu_memory_used_bytes", "Memory of the GPU in use; 0 on a CPU", registry=REGISTRY)
_GPU_TOTAL = Gauge("faithdiff_gpu_memory_total_bytes", "Memory of the GPU; 0 on a CPU", registry=REGISTRY)
_COLD_START = Gauge(
    "faithdiff_cold_start_seconds", "What it took to become ready, by part", ("part",), registry=REGISTRY
)
_MODEL = Gauge("faithdiff_model_info", "1 for the model a replica serves", ("model", "version"), registry=REGISTRY)

_PHASES = ("queued", "encode", "denoise", "decode")


def size_class(megapixels: float) -> str:
    """small, medium, large or huge, for a result of so many megapixels."""
    return next((name for name, most in _SIZE_CLASSES if megapixels <= most), "huge")


def observe_request(route: str, status: int, seconds: float, *, size: str = NO_SIZE) -> None:
    """An answered request; `route` is the pattern, such as /v1/jobs/{job_id}, and `seconds` to its first byte."""
    _REQUESTS.labels(route, str(status)).inc()
    _REQUEST_SECONDS.labels(route, size).observe(seconds)


def count_upload(num_bytes: int) -> None:
    _UPLOAD_BYTES.inc(num_bytes)


def count_refusal(reason: str) -> None:
    """Somebody was told to come again later; `reason` is the kind of the problem."""
    _REFUSALS.labels(reason).inc()


def count_webhook(outcome: str) -> None:
    """delivered, retried or given-up."""
    _WEBHOOKS.labels(outcome).inc()


def observe_queue(megapixels: float, seconds: float) -> None:
    """Work on a picture begins, `seconds` after it was accepted."""
    _QUEUE_SECONDS.labels(size_class(megapixels)).observe(max(0.0, seconds))


def count_takeover() -> None:
    """A job whose last replica was lost is claimed again."""
    _TAKEOVERS.inc()


def observe_end(state: str, *, megapixels: float, seconds: float, cause: str = _NO_CAUSE) -> None:
    """A picture is done, failed, cancelled or expired, `seconds` after it was accepted; `cause` is a problem's kind."""
    _PICTURES.labels(state, cause).inc()
    if state == "done":
        _PICTURE_SECONDS.labels(size_class(megapixels)).observe(max(0.0, seconds))
        _PIXELS.inc(megapixels * 1e6)


def observe_device(phase: str, seconds: float) -> None:
    """The device has worked for so long: on encode, denoise or decode."""
    _DEVICE_SECONDS.labels(phase).inc(seconds)


def observe_pass(num_tiles: int, num_slots: int, seconds: float) -> None:
    """One denoising pass over `num_tiles` tiles, where there was room for `num_slots`."""
    _PASS_SECONDS.observe(seconds)
    _TILES.inc(num_tiles)
    _SLOTS.inc(num_slots)


def count_step(megapixels: float) -> None:
    """A picture whose result has so many megapixels has taken a step."""
    _STEPS.inc()
    _MEGAPIXEL_STEPS.inc(megapixels)


def set_load(entries: Mapping[str, int], *, megapixels: float, free_megapixels: float) -> None:
    """What a replica has in hand now, by phase."""
    for phase in {*_PHASES, *entries}:
        _ENTRIES.labels(phase).set(entries.get(phase, 0))
    _MEGAPIXELS.set(megapixels)
    _FREE_MEGAPIXELS.set(free_megapixels)


def set_gpu_memory(*, used_bytes: int, total_bytes: int) -> None:
    _GPU_USED.set(used_bytes)
    _GPU_TOTAL.set(total_bytes)


def set_cold_start(*, download_s: float, load_s: float, compile_s: float) -> None:
    for part, seconds in (("download", download_s), ("load", load_s), ("compile", compile_s)):
        _COLD_START.labels(part).set(seconds)


def set_model(model: str, version: str) -> None:
    """The model that this replica serves from now on."""
    _MODEL.clear()
    _MODEL.labels(model, version).set(1)


def cause_of(problem: Mapping[str, object] | None) -> str:
    """The kind of a problem in JSON, as `observe_end` wants it."""
    return str((problem or {}).get("type", _NO_CAUSE)).rpartition(":")[2]


def _begin_at_zero() -> None:
    """Series that everybody wants to see before the first event; a rate would miss what makes a series appear."""
    for size in SIZE_CLASSES:
        _QUEUE_SECONDS.labels(size)
        _PICTURE_SECONDS.labels(size)
        _REQUEST_SECONDS.labels("/v1/upscale", size)
    for state in ("done", "cancelled", "expired"):
        _PICTURES.labels(state, _NO_CAUSE)
    _PICTURES.labels("failed", "internal-error")
    for phase in ("encode", "denoise", "decode"):
        _DEVICE_SECONDS.labels(phase)
    for outcome in ("delivered", "retried", "given-up"):
        _WEBHOOKS.labels(outcome)
    _REFUSALS.labels("limit-reached")


_begin_at_zero()
