"""Tracing: a span for each call, by OpenTelemetry's SDK, if OTEL_* variables ask for it.

Names are those of OpenTelemetry's conventions for generative AI. Knows no HTTP and no engine.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qmix.errors import UnsupportedError
from qmix.serving.http.call_record import Call
from qmix.serving.request import Ended

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracer() -> "Tracer | None":
    """What makes spans, or None unless the environment says where they go.

    Raises:
        UnsupportedError: it does, and the packages of the extra are missing.
    """
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none"
    if disabled or not any(map(os.environ.get, (*_ENDPOINTS, "OTEL_TRACES_EXPORTER"))):
        return None
    if exporter != "otlp":
        raise UnsupportedError(
            "qmix serve sends traces by OTLP over HTTP",
            where="OTEL_TRACES_EXPORTER",
            expected="otlp or none",
            found=exporter,
        )
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        raise UnsupportedError(
            "OTEL_* variables ask for traces, which need OpenTelemetry",
            remedy="Run: pip install 'qmix-runtime[otel]'",
        )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    given = OTELResourceDetector().detect().attributes
    provider = TracerProvider(resource=Resource.create({"service.name": "qmix", **given}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("qmix")


class CallTrace:
    """The span of one call, with spans of each request's time in the queue, in its prompt and in
    its reply.
    """

    def __init__(self, tracer: "Tracer", call: Call) -> None:
        """Begin the span, under the caller's `traceparent` if there is one."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind

        config = call.requests[0].config
        operation = "text_completion" if call.path == "/v1/completions" else "chat"
        self._span = tracer.start_span(
            f"{operation} {call.model}",
            context=propagate.extract(call.headers),
            kind=SpanKind.SERVER,
            start_time=_ns(call.begun),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "qmix",
                "gen_ai.request.model": call.model,
                "gen_ai.response.model": call.model,
                "gen_ai.response.id": call.id,
                "gen_ai.request.choice.count": len(call.requests),
                "url.path": call.path,
            },
        )
        asked = {
            "gen_ai.request.max_tokens": config.max_new_tokens,
            "gen_ai.request.temperature": config.temperature,
            "gen_ai.request.top_p": config.top_p,
        }
        self._span.set_attributes(
            {name: value for name, value in asked.items() if value is not None}
        )
        self._tracer, self._call = tracer, call
        self._ended: dict[int, Ended] = {}

    def put(self, index: int, ended: Ended) -> None:
        """A request has ended."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        begun, whole = self._call.begun, ended.elapsed_s
        first = ended.first_token_s if ended.new_tokens and ended.first_token_s else whole
        waited = min(ended.waited_s, first)
        context = set_span_in_context(self._span)
        for name, start, stop in (
            ("queue", 0.0, waited),
            ("prefill", waited, first),
            ("decode", first, whole),
        ):
            part = self._tracer.start_span(
                name, context, attributes={"qmix.choice": index}, start_time=_ns(begun + start)
            )
            part.end(_ns(begun + stop))
        self._ended[index] = ended
        if ended.finish not in ("stop", "length"):
            self._span.set_attribute("error.type", ended.finish)
            self._span.set_status(StatusCode.ERROR, str(ended.error or ended.finish))

    def end(self) -> None:
        """All requests have ended."""
        if not self._span.is_recording():
            return
        ended = [self._ended[index] for index in sorted(self._ended)]
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": sum(each.prompt_tokens for each in ended),
                "gen_ai.usage.cache_read.input_tokens": sum(each.cached_tokens for each in ended),
                "gen_ai.usage.output_tokens": sum(each.new_tokens for each in ended),
                "gen_ai.response.finish_reasons": [each.finish for each in ended],
            }
        )
        longest = max((each.elapsed_s for each in ended), default=0.0)
        self._span.end(_ns(self._call.begun + longest))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
