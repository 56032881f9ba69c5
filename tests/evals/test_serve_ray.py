"""Replicas of `qmix serve --ray` that are killed, replaced and ended under load."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from qmix.evals import serve_ray
from qmix.evals.serve_ray import Phase, measure_ray
from qmix.evals.serving.http_call import Address
from qmix.evals.serving.questions import Reply
from tests.support.models import TINY

_EVENT = b'data: {"choices": [{"text": "ab"}]}\n\n'
_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
_WHOLE = b'{"choices": [{"text": "ab"}]}'


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


ENDS = {
    "right": (True, _HEAD + chunk(_EVENT) + chunk(b"data: [DONE]\n\n") + chunk(b"")),
    "silent": (True, _HEAD + chunk(_EVENT) + chunk(b"")),
    "wrong": (False, b"HTTP/1.1 200 OK\r\n\r\n" + _WHOLE.replace(b"ab", b"a")),
    "cut off": (True, _HEAD + chunk(_EVENT)),
    "error event": (True, _HEAD + chunk(b'data: {"error": {"message": "m"}}\n\n')),
    "status 500": (True, b"HTTP/1.1 500 Internal Server Error\r\n\r\n"),
    "no connection": (False, b""),
    "hanging": (False, None),
}


@asynccontextmanager
async def answering(data):
    """A server that answers so, and closes the connection; None: it does neither."""
    over = asyncio.Event()

    async def answer(reader, writer):
        await reader.readuntil(b"}")
        if data is None:
            await over.wait()
        writer.write(data or b"")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield Address(server.sockets[0].getsockname()[1])
        over.set()


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_request_is_told_as_its_caller_sees_it(name, monkeypatch):
    streams, data = ENDS[name]
    monkeypatch.setattr(serve_ray, "_PATIENCE_S", 0.1 if data is None else 60.0)

    async def end():
        async with answering(data) as address:
            return await serve_ray._end(address, Reply((3,), 2, "ab"), streams=streams)

    assert asyncio.run(end())[0] == name


def test_faults_are_what_a_caller_cannot_know():
    ends = {"right": 5, "cut off": 2, "status 500": 1, "silent": 1, "hanging": 1, "wrong": 1}
    phase = Phase(asked=11, streamed=6, ends=ends, details=())
    assert (phase.faults, phase.errors) == (3, 6)


@pytest.mark.soak
def test_every_caller_gets_a_right_answer_or_an_error(counted):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    record = measure_ray(TINY, callers=20, requests=10)
    assert record.problems == (), str(record)
    counted(requests=record.killed.asked, of_which_lost=record.killed.errors)
