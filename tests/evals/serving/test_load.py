"""The load finds wrong texts and what is left behind, and counts what it asked."""

import asyncio
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from qmix.evals import serve_load, serve_peer, serve_slots
from qmix.evals.serving.load import put_load
from qmix.evals.serving.questions import right_replies
from qmix.evals.serving.server_process import Held
from tests.support.http_server import serving
from tests.support.models import TINY

HELD = Held(resident=1 << 30, descriptors=10, threads=9, running=0, waiting=0)
RECORD = serve_load.LoadRecord(
    command="", date="", cpu="x", versions={}, asked={"streams": 2, "slow": 1}, refused=4, wrong=(),
    elapsed_s=2.0, new_tokens=100, first_s=(0.1, 0.5), between_s=(0.01, 0.02),
    held=(HELD, HELD, HELD), exit_code=0, stop_s=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def served():
    with serving(context=1024, slots=3, waiting=4) as served:
        yield served


@pytest.fixture(scope="module")
def replies(served):
    return right_replies(served.model, served.tokenizer, 0, prompts=2)


def asked(served, replies, **options):
    address = SimpleNamespace(host="127.0.0.1", port=served.port)
    return asyncio.run(put_load(address, replies, **options))


def test_right_replies_are_found_right_in_any_company(served, replies):
    outcome = asked(served, replies, clients=6, requests=3, seed=27)
    served.until_idle()
    assert outcome.wrong == []
    assert outcome.asked.total() == 18
    assert len(outcome.asked) >= 4
    assert outcome.first_s
    assert all(seconds >= 0 for seconds in outcome.between_s)


def test_a_wrong_text_and_a_wrong_status_are_found(served, replies):
    other = [replace(reply, text=reply.text + "?") for reply in replies]
    outcome = asked(served, other, clients=3, requests=2, seed=3)
    assert any("expected" in line for line in outcome.wrong)
    beyond = [replace(reply, ids=(1,) * 2000) for reply in replies]
    outcome = asked(served, beyond, clients=3, requests=2, seed=3)
    assert any("status 400" in line for line in outcome.wrong)


def test_what_is_left_behind_is_named():
    assert RECORD.leaks == ()
    more = replace(HELD, descriptors=11, resident=2 << 30)
    assert [line.partition(":")[0] for line in replace(RECORD, held=(HELD, HELD, more)).leaks] == [
        "descriptors",
        "memory",
    ]
    assert "3 questions (1 slow, 2 streams) in 2 s" in str(RECORD)
    assert "| to the first token | 100 ms | 500 ms |" in str(RECORD)


def test_a_failure_is_exit_code_5(monkeypatch, capsys):
    monkeypatch.setattr(serve_load, "measure_load", lambda *_, **__: RECORD)
    assert serve_load.main([]) == 0
    for bad in (replace(RECORD, wrong=("streams: no",)), replace(RECORD, exit_code=1)):
        monkeypatch.setattr(serve_load, "measure_load", lambda *_, bad=bad, **__: bad)
        assert serve_load.main([]) == 5
    assert "exit code 1" in capsys.readouterr().err


def test_slots_are_timed_turn_by_turn():
    record = serve_slots.measure_slots(TINY, slots=(1, 2), turns=2, new=4, ram=None)
    one, two = record.timings
    assert (one.slots, one.gain, one.experts) == (1, (1.0, 1.0, 1.0), 2.0)
    assert two.gain[1] <= two.gain[0] <= two.gain[2]
    assert 2 <= two.experts <= 4
    assert "| 2 | " in str(record)


def test_a_peer_is_asked_the_same(served, monkeypatch):
    @contextmanager
    def running(*_):
        yield SimpleNamespace(address=SimpleNamespace(host="127.0.0.1", port=served.port))

    monkeypatch.setattr(serve_peer, "_REQUESTS", 1)
    monkeypatch.setattr(serve_peer, "_PROMPT_WORDS", 5)
    monkeypatch.setattr(serve_peer, "qmix_server", running)
    monkeypatch.setattr(serve_peer, "llama_server", running)
    record = serve_peer.measure_peer(TINY, llama_python="false", callers=(1, 2), turns=1, new=3)
    assert [(each.callers, each.server) for each in record.timings] == [
        (count, server) for count in (1, 2) for server in ("qmix", "llama-cpp-python")
    ]
    assert record.timings[0].of_ours == 1
    assert all(each.tokens_per_s > 0 and each.first_s > 0 for each in record.timings)
