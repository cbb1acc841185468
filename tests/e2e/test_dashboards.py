"""Dashboards and alerts against what a gateway really shows, and one trace id from the gateway to a replica's step."""

from __future__ import annotations

import json
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from fastapi import Request, Response
from prometheus_client.parser import text_string_to_metric_families

from sr_platform.cluster import REPOSITORY_PATH

DASHBOARDS_PATH = REPOSITORY_PATH / "infra" / "dashboards"
SECRET = "fd_0123456789abcdef-s3cr3t"  # noqa: S105
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# What Grafana fills in.
VARIABLES = {"$__rate_interval": "1m", "$price_per_device_second": "0.001"}


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DASHBOARDS_PATH / "serving.json").read_text())
    return loaded


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DASHBOARDS_PATH / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Of every panel and rule, by name, as Prometheus gets them."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found[f"panel {panel['title']} {target['refId']}"] = expression
    return found


@dataclass
class Query:
    """What an expression asks for: its selectors, and the labels it groups or matches by."""

    selectors: list[Any] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)


def parsed(expression: str) -> Query:
    query = Query()
    _walk(promql_parser.parse(expression), query)
    return query


def _walk(node: Any, query: Query) -> None:
    if isinstance(node, promql_parser.VectorSelector):
        query.selectors.append(node)
    elif isinstance(node, promql_parser.MatrixSelector):
        query.selectors.append(node.vector_selector)
    elif isinstance(node, promql_parser.BinaryExpr):
        matching = node.modifier.matching if node.modifier else None
        query.labels |= set(matching.labels) if matching else set()
        _walk(node.lhs, query)
        _walk(node.rhs, query)
    elif isinstance(node, promql_parser.AggregateExpr):
        query.labels |= set(node.modifier.labels) if node.modifier else set()
        _walk(node.expr, query)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            _walk(argument, query)
    elif isinstance(node, (promql_parser.ParenExpr, promql_parser.UnaryExpr)):
        _walk(node.expr, query)
    else:
        assert isinstance(node, promql_parser.NumberLiteral), type(node)


def series_of(text: str) -> dict[str, list[dict[str, str]]]:
    """The labels of every series, by name."""
    found = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].append(sample.labels)
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def small_application() -> Any:
    """A gateway and a replica that do for one picture what those of the service do, with its own pieces."""
    from ray import serve

    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_wait_loop_s": 0.1}
    replica = serve.deployment(name="Replica", **options)(replica_class()).bind()
    gateway = serve.deployment(name="Gateway", **options)(serve.ingress()(gateway_class()))
    return gateway.bind(replica)


# Made in functions, so that Ray sends the classes whole: replicas cannot import this file.
def replica_class() -> type:
    class Replica:
        def __init__(self) -> None:
            from serve import measurements
            from serve.visibility import make_visible
            from sr_platform.observability import LogConfig

            make_visible(LogConfig(form="json", level="DEBUG"))
            measurements.set_cold_start(download_s=0.1, load_s=0.2, compile_s=0.3)
            measurements.set_model("nano", "nano")

        async def restore(self, traceparent: str, job_id: str) -> str:
            from concurrent.futures import ThreadPoolExecutor

            from serve import measurements, tracing

            with (
                tracing.entered(tracing.from_traceparent(traceparent), job_id=job_id),
                tracing.span("restore") as trace,
            ):
                measurements.observe_queue(0.5, 0.01)
                with ThreadPoolExecutor(1) as device:
                    device.submit(self._step, trace, job_id).result()
                measurements.observe_end("done", megapixels=0.5, seconds=0.2)
            return str(trace.trace_id)

        def _step(self, trace: Any, job_id: str) -> None:
            from serve import measurements, tracing

            measurements.observe_device("denoise", 0.1)
            measurements.observe_pass(1, 2, 0.1)
            measurements.count_step(0.5)
            measurements.set_load({"denoise": 1}, megapixels=0.5, free_megapixels=8.0)
            tracing.record_span(trace, "step", 0.1, step=1, job_id=job_id)

    return Replica


def gateway_class() -> type:
    class Gateway:
        def __init__(self, replica: Any) -> None:
            from serve.visibility import make_visible
            from sr_platform.observability import LogConfig

            self.replica, self.name = replica, make_visible(LogConfig(form="json"))

        def __serve_build_asgi_app__(self) -> Any:
            from types import SimpleNamespace

            from fastapi import FastAPI

            from serve.metrics import MetricsConfig, install_metrics, states_of_deployment
            from serve.problems import install_handlers

            api = FastAPI()
            install_handlers(api)
            # A plain route: FastAPI would look for the types of its arguments in this file.
            api.router.add_route("/v1/upscale", self.upscale, methods=["POST"])
            backlog = SimpleNamespace(num_queued=0, num_running=0, megapixels=0.0, work=0.0, oldest_queued_s=0.0)
            install_metrics(
                api,
                MetricsConfig(),
                process=self.name,
                backlog=lambda: backlog,
                replica_states=lambda: states_of_deployment("observed", "Replica"),
            )
            return api

        async def upscale(self, request: Request) -> Response:
            import logging

            from fastapi.responses import PlainTextResponse

            from serve import measurements, metrics, tracing

            metrics.note_size(request, 0.5)
            measurements.count_refusal("queue-full")
            trace = tracing.from_traceparent(request.headers.get("traceparent"))
            with tracing.entered(trace, job_id="job-1"), tracing.span("upscale") as inside:
                # As somebody might, who looks for a mistake.
                logging.getLogger("serve.gateway").warning("got %s", dict(request.headers))
                return PlainTextResponse(await self.replica.restore.remote(inside.traceparent, "job-1"))

    return Gateway


@dataclass
class Observed:
    """What one request left behind: its answer, what GET /metrics shows, and the log of every process."""

    answer: str
    metrics: str
    log: list[dict[str, Any]]
    raw_log: str


@pytest.fixture(scope="module")
def observed(local_ray: None) -> Iterator[Observed]:
    import ray
    from ray import serve

    logs_path = Path(ray._private.worker._global_node.get_logs_dir_path())
    earlier = set(logs_path.glob("worker-*.err"))
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(small_application(), name="observed", route_prefix="/")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        headers = {"Authorization": f"Bearer {SECRET}", "traceparent": TRACEPARENT}
        answer = client.post("/v1/upscale", headers=headers)
        assert answer.status_code == 200, answer.text
        metrics = wait_for(lambda: scrape(client), lambda text: bool(done_of(text)))
    files = sorted(set(logs_path.glob("worker-*.err")) - earlier)
    raw_log = "".join(path.read_text() for path in [*files, *(logs_path / "serve").glob("*observed*")])
    log = [json.loads(line) for line in raw_log.splitlines() if line.startswith('{"time"')]
    yield Observed(answer.text, metrics, log, raw_log)
    serve.shutdown()


def scrape(client: httpx.Client) -> str:
    response = client.get("/metrics")
    assert response.status_code == 200, response.text
    return response.text


def done_of(text: str) -> str:
    """The lines of pictures that a replica has done."""
    return "\n".join(line for line in text.splitlines() if 'state="done"' in line and not line.endswith(" 0.0"))


def wait_for(ask: Callable[[], str], is_there: Callable[[str], bool], timeout_s: float = 30) -> str:
    give_up_s = time.monotonic() + timeout_s
    while not is_there(text := ask()):
        assert time.monotonic() < give_up_s, text
        time.sleep(0.2)
    return text


@pytest.mark.ray
def test_every_panel_and_alert_asks_for_series_that_a_gateway_shows(observed: Observed) -> None:
    shown = series_of(observed.metrics)
    missing = []
    for name, expression in expressions().items():
        query = parsed(expression)
        assert query.selectors, name
        for selector in query.selectors:
            labels = [set(series) for series in shown.get(selector.name, [])]
            matched = {matcher.name for matcher in selector.matchers.matchers}
            if not any(matched <= of_one for of_one in labels):
                missing.append(f"{name}: {selector}")
        known = {label for selector in query.selectors for series in shown.get(selector.name, []) for label in series}
        missing += [f"{name}: by {label}" for label in query.labels - known]
    assert missing == []


@pytest.mark.ray
def test_values_that_panels_and_alerts_select_are_values_there_are(observed: Observed) -> None:
    shown = series_of(observed.metrics)
    wrong = []
    for name, expression in expressions().items():
        for selector in parsed(expression).selectors:
            for matcher in selector.matchers.matchers:
                values = {series.get(matcher.name, "") for series in shown[selector.name]}
                if str(matcher.op) == "MatchOp.Equal" and matcher.value not in values:
                    wrong.append(f"{name}: {matcher.name}={matcher.value!r}, there are {sorted(values)}")
    assert wrong == []


@pytest.mark.ray
def test_everything_that_is_counted_is_looked_at_somewhere(observed: Observed) -> None:
    asked = {selector.name for text in expressions().values() for selector in parsed(text).selectors}
    families = {re.sub("_(bucket|sum|count|total)$", "", name) for name in asked}
    shown = {family.name for family in text_string_to_metric_families(observed.metrics)}
    of_the_process = {name for name in shown if name.startswith("faithdiff_process_")}
    assert shown - families - of_the_process == set()


@pytest.mark.ray
def test_both_processes_stand_in_one_scrape_and_counted_one_picture(observed: Observed) -> None:
    replicas = {series["replica"] for series in series_of(observed.metrics)["faithdiff_steps_total"]}
    assert sorted(name.split("#")[0] for name in replicas) == ["Gateway", "Replica"]
    values: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(observed.metrics):
        for sample in family.samples:
            values[sample.name] += sample.value
    assert values["faithdiff_steps_total"] == 1
    assert values["faithdiff_queue_seconds_count"] == 1
    assert values["faithdiff_pixels_total"] == 500_000
    assert values["faithdiff_device_seconds_total"] == pytest.approx(0.1)
    assert values["faithdiff_replicas"] == 1


@pytest.mark.ray
def test_one_trace_id_leads_from_the_request_to_the_step(observed: Observed) -> None:
    assert observed.answer == TRACEPARENT.split("-")[1]
    spans = {line["span"]: line for line in observed.log if "span" in line}
    upscale, restore, step = spans["upscale"], spans["restore"], spans["step"]
    assert {line["trace_id"] for line in spans.values()} == {observed.answer}
    assert {line["job_id"] for line in spans.values()} == {"job-1"}
    assert [upscale["parent_id"], restore["parent_id"], step["parent_id"]] == [
        TRACEPARENT.split("-")[2],
        upscale["span_id"],
        restore["span_id"],
    ]
    assert upscale["replica"].startswith("Gateway#")
    assert step["replica"] == restore["replica"]
    assert step["replica"].startswith("Replica#")


@pytest.mark.ray
def test_lines_of_ray_serve_have_the_form_of_ours(observed: Observed) -> None:
    of_serve = [line for line in observed.log if line["logger"] == "ray.serve"]
    assert any("POST /v1/upscale 200" in line["message"] for line in of_serve)
    assert {line["replica"].split("#")[0] for line in of_serve} <= {"Gateway", "Replica"}


@pytest.mark.ray
def test_a_secret_is_in_no_log_and_no_metric(observed: Observed) -> None:
    assert "[hidden]" in observed.raw_log, "the headers were logged"
    assert SECRET not in observed.raw_log
    assert SECRET not in observed.metrics


def test_a_dashboard_can_be_imported_and_keeps_its_address() -> None:
    made = dashboard()
    assert (made["uid"], made["title"]) == ("faithdiff-serving", "FaithDiff serving")
    assert [variable["type"] for variable in made["templating"]["list"]] == ["datasource", "textbox"]
    charts = [panel for panel in made["panels"] if panel["type"] != "row"]
    for panel in charts:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert panel["description"].endswith("."), panel["title"]
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])
    assert len({panel["title"] for panel in made["panels"]}) == len(made["panels"])


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_every_alert_says_what_is_wrong_and_where_to_look() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    titles = {panel["title"] for panel in dashboard()["panels"]}
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "action"}
        named = re.findall(r'See "(.+?)"', rule["annotations"]["action"])
        assert set(named) <= titles, rule["alert"]
