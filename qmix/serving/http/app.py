"""The routes, and what answers them. Knows no sockets."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from qmix.errors import QmixError, UsageError
from qmix.serving.call_reader import CallReader
from qmix.serving.engine import Engine
from qmix.serving.grammar import Grammar
from qmix.serving.http import (
    chat_request,
    completion_request,
    messages_request,
    replies,
    token_answers,
    token_request,
)
from qmix.serving.http.body import Bodies, parsed
from qmix.serving.http.call_record import Call as EngineCall
from qmix.serving.http.call_record import CallRecord
from qmix.serving.http.chat_reply import ChatReply
from qmix.serving.http.chat_request import ChatRequest
from qmix.serving.http.completion_request import CompletionRequest
from qmix.serving.http.errors import MESSAGES, ApiError
from qmix.serving.http.event_stream import EventStream
from qmix.serving.http.flight import Flights, LeftError, unless_left
from qmix.serving.http.guard import HEALTH, PAGE, Access, Guard
from qmix.serving.http.messages_reply import MessagesReply
from qmix.serving.http.metrics import CONTENT_TYPE, Metrics
from qmix.serving.http.page.document import page
from qmix.serving.http.prompt_log import PromptLog
from qmix.serving.http.replies import CompletionReply, Head, ReplyFormat
from qmix.serving.http.served_model import ServedModel
from qmix.serving.request import Request as EngineRequest
from qmix.serving.tools import new_id

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from opentelemetry.trace import Tracer

Asked = TypeVar("Asked", ChatRequest, CompletionRequest)
Call = tuple[list[EngineRequest], ReplyFormat]

_TRIAL_WAIT_S = 10.0  # until a new grammar's turn to be tried has come and gone
_LEFT = 499  # nobody reads it


class Api:
    """The endpoints over one engine.

    Args:
        deadline_s: seconds that a request may take.
        prompts: where they are logged; None: nowhere.
        tracer: what makes spans of calls; None: there are none.
    """

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        deadline_s: float,
        prompts: PromptLog | None = None,
        tracer: "Tracer | None" = None,
    ) -> None:
        self._engine, self._model, self._deadline_s = engine, model, deadline_s
        self._prompts, self._tracer = prompts, tracer
        self._bodies = Bodies()
        self._metrics = Metrics(engine)
        self._flights = Flights(engine, self._metrics.observe)

    async def models(self, _: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._model.document]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        self._model.check_name(request.path_params["name"])
        return JSONResponse(self._model.document)

    async def health(self, _: Request) -> Response:
        """GET /health: 200 while requests are taken, 503 otherwise."""
        failure = self._engine.failure
        if self._engine.healthy:
            return JSONResponse({"status": "ok"})
        status = "shutting down" if failure is None else "failed"
        error = None if failure is None else str(failure)
        return JSONResponse({"status": status, "error": error}, 503)

    async def slots(self, _: Request) -> Response:
        """GET /slots: what runs now, in numbers."""
        slots = [asdict(slot) for slot in self._engine.slots]
        return JSONResponse({"waiting": self._engine.counts.waiting, "slots": slots})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answer(request, chat_request.parse, self._chat)

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages"""
        return await self._answer(request, messages_request.parse, self._messages)

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens"""

        def counted(document: dict[str, Any]) -> dict[str, Any]:
            asked = messages_request.parse(document, counts=True)
            return {"input_tokens": len(self._model.ids_of(asked))}

        return await self._documented(request, counted)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answer(request, completion_request.parse, self._completion)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""

        def ids(document: dict[str, Any]) -> dict[str, Any]:
            return token_answers.tokenized(self._model, token_request.parse_tokenize(document))

        return await self._documented(request, ids)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""

        def text(document: dict[str, Any]) -> dict[str, Any]:
            return token_answers.detokenized(self._model, token_request.parse_detokenize(document))

        return await self._documented(request, text)

    async def tokenizer(self, _: Request) -> Response:
        """GET /tokenizer_info"""
        return JSONResponse(token_answers.described(self._model))

    async def metrics(self, _: Request) -> Response:
        """GET /metrics"""
        return Response(self._metrics.text, media_type=CONTENT_TYPE)

    async def embeddings(self, _: Request) -> Response:
        """POST /v1/embeddings"""
        raise ApiError(
            "the model writes text; it has no embeddings", status=404, code="unsupported"
        )

    async def _documented(
        self, request: Request, prepare: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> Response:
        try:
            async with self._bodies.read(request) as body:
                return JSONResponse(await self._bodies.run(lambda: prepare(parsed(body))))
        except LeftError:
            return Response(status_code=_LEFT)

    async def _answer(
        self,
        request: Request,
        parse: Callable[[dict[str, Any]], Asked],
        prepare: Callable[[Asked, "LLMatcher | None"], Call],
    ) -> Response:
        def read(body: bytes) -> tuple[Asked, Grammar | None]:
            document = parsed(body)
            if self._prompts is not None:
                self._prompts.put(request.url.path, document)
            asked = parse(document)
            return asked, self._model.grammar(asked)

        try:
            async with self._bodies.read(request) as body:
                self._flights.check_room()
                asked, grammar = await self._bodies.run(partial(read, body))
                matcher = None if grammar is None else await self._compiled(grammar)
                requests, form = await self._bodies.run(partial(prepare, asked, matcher))
            flight = self._flights.begin(requests, self._record(request, asked, requests, form))
            if asked.stream:
                return EventStream(replies.chunks(flight, form), flight.cancel, request.url.path)
            try:
                document = await unless_left(request.receive, replies.whole(flight, form))
            finally:
                flight.cancel()
            return JSONResponse(document)
        except LeftError:
            return Response(status_code=_LEFT)

    def _record(
        self, request: Request, asked: Asked, requests: list[EngineRequest], form: ReplyFormat
    ) -> CallRecord:
        name, path = self._model.name, request.url.path
        call = EngineCall(form.id, path, name, asked.stream, requests, request.headers)
        if self._tracer is None:
            return CallRecord(call)
        from qmix.serving.http.tracing import CallTrace

        return CallRecord(call, CallTrace(self._tracer, call))

    async def _compiled(self, grammar: Grammar) -> "LLMatcher":
        """
        Raises:
            ApiError: it is no grammar, costs too much, or many new ones are being tried.
        """
        try:
            async with asyncio.timeout(_TRIAL_WAIT_S):
                return await asyncio.wrap_future(self._model.grammars.submit(grammar.text))
        except TimeoutError:
            raise ApiError(
                "too many new grammars at a time; try again later", status=429, code="queue_full"
            ) from None
        except UsageError as error:
            raise ApiError(str(error), param=grammar.field, code="invalid_value") from None
        except QmixError as error:
            raise ApiError.of(error) from error

    def _chat(self, asked: ChatRequest, matcher: "LLMatcher | None") -> Call:
        requests = self._model.chat(asked, self._deadline_s, matcher)
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        form = ChatReply(
            Head("chatcmpl-", kind, self._model.name),
            self._model.tokenizer,
            reports=asked.logprobs,
            choices_per_prompt=asked.n,
            includes_usage=asked.stream_options,
            readers=self._model.readers(asked),
        )
        return requests, form

    def _messages(self, asked: ChatRequest, matcher: "LLMatcher | None") -> Call:
        (request,) = requests = self._model.chat(asked, self._deadline_s, matcher)
        head = {"id": f"msg_{new_id()}", "model": self._model.name}
        readers = self._model.readers(asked) or [CallReader(None)]
        form = MessagesReply(head, len(request.ids), readers[0])
        return requests, form

    def _completion(self, asked: CompletionRequest, matcher: "LLMatcher | None") -> Call:
        requests = self._model.completion(asked, self._deadline_s, matcher)
        form = CompletionReply(
            Head("cmpl-", "text_completion", self._model.name),
            self._model.tokenizer,
            requests,
            self._model.echoes(asked) if asked.echo else None,
            reports=asked.logprobs is not None,
            echo_only=asked.max_tokens == 0,
            choices_per_prompt=asked.n,
            includes_usage=asked.stream_options,
        )
        return requests, form


def app(
    engine: Engine,
    model: ServedModel,
    access: Access,
    *,
    deadline_s: float,
    prompts: PromptLog | None = None,
    tracer: "Tracer | None" = None,
) -> Starlette:
    """The application for a server of ASGI; see Api."""
    api = Api(engine, model, deadline_s, prompts, tracer)
    return Starlette(
        routes=[
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route(MESSAGES, api.messages, methods=["POST"]),
            Route(f"{MESSAGES}/count_tokens", api.count_tokens, methods=["POST"]),
            Route("/v1/completions", api.completion, methods=["POST"]),
            Route("/v1/embeddings", api.embeddings, methods=["POST"]),
            Route("/tokenize", api.tokenize, methods=["POST"]),
            Route("/detokenize", api.detokenize, methods=["POST"]),
            Route("/tokenizer_info", api.tokenizer),
            Route("/metrics", api.metrics),
            Route("/slots", api.slots),
            Route(HEALTH, api.health),
            Route(PAGE, _page),
        ],
        middleware=[Middleware(Guard, access=access)],
        exception_handlers={
            ApiError: _refused,
            HTTPException: _no_route,
            Exception: _broken,
        },
    )


async def _page(_: Request) -> Response:
    """GET /: the page that talks to this API."""
    shown = page()
    return Response(shown.html, media_type="text/html; charset=utf-8", headers=dict(shown.headers))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return ApiError(what, status=error.status_code, code="unknown_url").response(request.url.path)


async def _broken(request: Request, error: Exception) -> Response:
    failed = ApiError("qmix failed: its log says where", status=500, code="failed")
    return failed.response(request.url.path)
