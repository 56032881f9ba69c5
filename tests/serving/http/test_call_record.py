"""What the log and a trace say of calls: --log-json's lines, and OpenTelemetry's spans."""

import json
import logging
import re

import pytest

from qmix.commands import json_log
from qmix.errors import QmixError, UnsupportedError
from qmix.generation.config import GenerationConfig
from qmix.serving.http import tracing
from qmix.serving.http.call_record import Call, CallRecord
from qmix.serving.request import Ended, Piece, Request
from tests.support.http_server import serving
from tests.support.process import qmix

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def served():
    with serving() as server:
        yield server


DONE = Ended(
    finish="stop",
    prompt_tokens=3,
    cached_tokens=1,
    new_tokens=2,
    waited_s=0.25,
    first_token_s=0.5,
    elapsed_s=1.5,
)


def call(choices=1, **headers):
    request = Request([1, 2, 3], GenerationConfig(max_new_tokens=7, temperature=0.5))
    requests = [request] * choices
    return Call("cmpl-1", "/v1/completions", "tiny", False, requests, headers, begun=1000.0)


@pytest.fixture
def lines():
    """What --log-json has written since, as documents."""
    root, qmix_logger = logging.getLogger(), logging.getLogger("qmix")
    requests = logging.getLogger("qmix.requests")
    before = root.handlers, qmix_logger.handlers, qmix_logger.level, requests.level
    written = []

    class Kept(logging.Handler):
        def emit(self, record):
            written.append(json.loads(json_log.line(record)))

    root.handlers, qmix_logger.handlers = [Kept()], []
    qmix_logger.setLevel(logging.INFO)
    requests.setLevel(logging.INFO)
    yield written
    root.handlers, qmix_logger.handlers = before[:2]
    qmix_logger.setLevel(before[2])
    requests.setLevel(before[3])


def test_a_line_for_each_request_that_ended_or_whose_caller_left(lines):
    record = CallRecord(call(choices=2))
    record.put(0, Piece(5, "five"))
    record.put(1, Piece(5, "five"))
    record.put(0, DONE)
    record.close()
    record.close()
    first, second = lines
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "event": "request",
        "request_id": "cmpl-1",
        "choice": 0,
        "path": "/v1/completions",
        "model": "tiny",
        "stream": False,
        "finish": "stop",
        "prompt_tokens": 3,
        "cached_tokens": 1,
        "new_tokens": 2,
        "waited_s": 0.25,
        "first_token_s": 0.5,
        "elapsed_s": 1.5,
        "error": None,
    }
    assert (second["choice"], second["finish"], second["new_tokens"]) == (1, "cancelled", 1)


def test_a_failure_is_an_error_and_what_modules_say_is_a_notice(lines):
    record = CallRecord(call())
    record.put(0, Ended(finish="error", prompt_tokens=3, error=QmixError("the disk is gone")))
    logging.getLogger("qmix.nn").warning("%s: slow", "a disk")
    logging.getLogger("py.warnings").warning("%s", "warning: a prompt was not kept: no space\n")
    failed, notice, warned = lines
    assert warned["message"] == "a prompt was not kept: no space"
    assert (failed["level"], failed["error"]) == ("error", "the disk is gone")
    assert (notice["event"], notice["message"], notice["request_id"]) == (
        "notice",
        "a disk: slow",
        None,
    )


def test_the_server_logs_replies_and_refusals_by_their_ids(served, lines):
    reply = served.post("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2})
    served.post("/v1/completions", {"model": "other", "prompt": "a"})
    told = [line for line in lines if line["event"] in ("request", "refused")]
    assert told[0]["request_id"] == reply[1]["id"]
    assert (told[0]["new_tokens"], told[1]["event"], told[1]["status"]) == (2, "refused", 404)


def test_the_error_that_ends_a_command_is_a_line_too(lines, tmp_path):
    done = qmix("serve", tmp_path / "none", "--log-json")
    (document,) = map(json.loads, done.stderr.splitlines())
    assert (document["event"], document["level"]) == ("failed", "error")
    assert document["exit_code"] == done.returncode != 0


@pytest.fixture
def exporter():
    """OpenTelemetry's own, which keeps spans in memory."""
    pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


def traced(exporter, call):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return CallRecord(call, tracing.CallTrace(provider.get_tracer("qmix"), call))


def test_a_call_is_a_span_with_queue_prefill_and_decode_under_the_callers(exporter):
    record = traced(exporter, call(traceparent=PARENT))
    record.put(0, DONE)
    record.close()
    queue, prefill, decode, whole = exporter.get_finished_spans()
    assert [each.name for each in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert whole.name == "text_completion tiny"
    assert f"{whole.context.trace_id:032x}-{whole.parent.span_id:016x}" == PARENT[3:52]
    assert queue.parent.span_id == whole.context.span_id
    times = [queue.start_time, prefill.start_time, decode.start_time, decode.end_time]
    assert times == [int(1e9 * second) for second in (1000, 1000.25, 1000.5, 1001.5)]
    said = dict(whole.attributes)
    assert {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": "cmpl-1",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop",),
    }.items() <= said.items()
    assert whole.status.is_unset


def test_a_request_that_failed_makes_the_span_an_error(exporter):
    record = traced(exporter, call(choices=2))
    record.put(1, DONE)
    record.close()
    (whole,) = (span for span in exporter.get_finished_spans() if span.parent is None)
    assert whole.attributes["error.type"] == "cancelled"
    assert not whole.status.is_ok
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("cancelled", "stop")


def test_traces_are_made_where_the_environment_asks_and_only_there(monkeypatch):
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED", *tracing._ENDPOINTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    assert tracing.tracer() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    with pytest.raises(UnsupportedError, match="otel"):
        tracing.tracer()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(UnsupportedError, match="OTLP"):
        tracing.tracer()
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.tracer() is None


def test_the_environment_names_the_service(exporter, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    resource = tracing.tracer().resource.attributes
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("qmix", "test")
