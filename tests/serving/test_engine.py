"""The engine under many threads: nobody's text is another's, nothing is left behind."""

import random
import threading
from contextlib import closing

import pytest
import torch

from qmix.errors import QmixError
from qmix.generation.config import GenerationConfig
from qmix.serving.engine import Engine
from qmix.serving.limits import Limits
from qmix.serving.request import BusyError, Ended, Events, Request
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def engine(model):
    limits = Limits(context=64, slots=4, waiting=100, chunk=8)
    with closing(Engine(model, LlamaTokenizer.from_pretrained(TINY), limits)) as engine:
        yield engine


def request(ids, new=8, **options):
    return Request(tuple(ids), GenerationConfig(max_new_tokens=new, eos_token_id=-1), **options)


def reply(engine, *given, **options):
    events = Events()
    engine.submit(request(*given, **options), events)
    *pieces, end = events
    return [piece.id for piece in pieces], end


def test_callers_of_many_threads_get_their_own_texts(model, engine):
    prompts = [[3 + i, 4, 5 + i % 3] for i in range(8)]
    right = {
        tuple(ids): model.generate(
            torch.tensor([ids]), GenerationConfig(max_new_tokens=8, eos_token_id=-1)
        )[0, 3:].tolist()
        for ids in prompts
    }
    wrong, cancelled = [], []

    def caller(seed):
        draw = random.Random(seed)
        for _ in range(5):
            ids = draw.choice(prompts)
            events = Events()
            ticket = engine.submit(request(ids), events)
            leaves_after = draw.choice([None, None, 0, 3])
            new = []
            for event in events:
                if isinstance(event, Ended):
                    break
                new.append(event.id)
                if len(new) == leaves_after or leaves_after == 0:
                    ticket.cancel()
                    cancelled.append(ticket)
            if new != right[tuple(ids)][: len(new)]:
                wrong.append((ids, new))
            if event.finish not in ("length", "cancelled") or event.new_tokens != len(new):
                wrong.append(event)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cancelled
    assert engine.counts.requests == 60
    assert engine.counts.running == engine.counts.waiting == engine.counts.failed == 0


def test_closing_ends_what_runs_and_refuses_what_comes(model):
    engine = Engine(model, LlamaTokenizer.from_pretrained(TINY), Limits(context=512, slots=1))
    started = threading.Event()
    events = Events()

    def listener(event):
        started.set()
        events(event)

    engine.submit(request([5], new=500), listener)
    waiting = Events()
    engine.submit(request([6]), waiting)
    started.wait()
    engine.close(drain_s=0)
    *_, end = events
    assert end.finish == "shutdown"
    assert next(iter(waiting)).finish == "shutdown"
    assert not engine.healthy
    with pytest.raises(BusyError, match="takes no requests"):
        engine.submit(request([5]), print)
    engine.close()


def test_closing_lets_what_runs_come_to_its_end(model):
    with closing(Engine(model, LlamaTokenizer.from_pretrained(TINY), Limits(context=64))) as engine:
        events = Events()
        engine.submit(request([5, 6]), events)
    *_, end = events
    assert end.finish == "length"


def test_a_fault_of_the_engine_is_told_to_all_and_shows_in_its_health(model, monkeypatch):
    engine = Engine(model, LlamaTokenizer.from_pretrained(TINY), Limits(context=64))
    assert engine.healthy

    def lost(*_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(model, "next_logits", lost)
    ids, end = reply(engine, [5])
    assert (ids, end.finish) == ([], "error")
    engine._thread.join()
    assert not engine.healthy
    assert isinstance(engine.failure, QmixError)
    with pytest.raises(BusyError, match="the GPU failed"):
        engine.submit(request([5]), print)


def test_a_listener_may_submit(engine):
    second = Events()

    def listener(event):
        if isinstance(event, Ended):
            engine.submit(request([7]), second)

    engine.submit(request([5]), listener)
    *pieces, end = second
    assert len(pieces) == 8
    assert end.finish == "length"
