"""A folder of prompts beside the steps: found again after a restart, and nobody waits for it."""

import shutil
import threading
import time
from contextlib import closing

import pytest

from qmix.generation.prompt_cache import PromptCache
from qmix.serving.engine import Engine
from qmix.serving.limits import Limits
from qmix.serving.request import Events
from qmix.serving.scheduler import Scheduler
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.callers import Caller, run
from tests.support.models import TINY, ids, small_model

LONG = ids(60)[0].tolist()
LIMITS = Limits(context=120, slots=2)


@pytest.fixture(scope="module")
def model():
    return small_model(max_position_embeddings=256)


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prompts"


@pytest.fixture
def scheduler(model, tokenizer, folder):
    """Makes one that keeps its texts in the folder; all are closed in the end."""
    made = []

    def make(limits=LIMITS, prompts=None, model=model):
        prompts = prompts or PromptCache(folder, "m")
        made.append(Scheduler(model, tokenizer, limits, prompts=prompts))
        return made[-1]

    yield make
    for one in made:
        one.close()


def close(scheduler):
    scheduler.close(time.monotonic() + 60)


def plain(model, tokenizer, caller):
    """The ids of a request without a folder."""
    other = Caller(caller.request.ids, new=len(caller.ids))
    run(Scheduler(model, tokenizer, LIMITS), [other])
    return other.ids


@pytest.mark.parametrize("window", [None, 24])
def test_a_server_that_starts_again_goes_on_where_the_last_one_was(scheduler, tokenizer, window):
    model = small_model(max_position_embeddings=256, sliding_window=window)
    first = Caller(LONG)
    one = scheduler(model=model)
    run(one, [first])
    assert first.end.cached_tokens == 0
    close(one)
    again = scheduler(model=model)
    second = Caller([*LONG, *first.ids, 9, 8])
    run(again, [second])
    assert second.end.cached_tokens == len(LONG) + len(first.ids) - 1
    assert again.counts.restored_tokens == second.end.cached_tokens
    assert second.ids == plain(model, tokenizer, second)


def test_what_a_slot_holds_is_not_read_and_a_file_that_gives_more_is(scheduler, model, tokenizer):
    one = scheduler()
    run(one, [first := Caller(LONG)])
    close(one)
    again = scheduler()
    held = [*LONG[:20], 7, 7]
    run(again, [Caller(held)])
    run(again, [second := Caller([*LONG, 5])])  # 60 of the folder, 20 of a slot
    run(again, [third := Caller([*LONG, 5, *second.ids, 6])])
    assert second.end.cached_tokens == again.counts.restored_tokens == 60
    assert third.end.cached_tokens == 61 + len(second.ids) - 1
    for caller in (second, third):
        assert caller.ids == plain(model, tokenizer, caller)
    assert first.ids


def test_a_flipped_byte_is_a_miss(scheduler, folder, model, tokenizer):
    one = scheduler()
    run(one, [first := Caller(LONG)])
    close(one)
    (path,) = folder.glob("*.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    again = scheduler()
    run(again, [second := Caller([*LONG, *first.ids])])
    assert second.end.cached_tokens == again.counts.restored_tokens == 0
    assert second.ids == plain(model, tokenizer, second)


def test_two_servers_share_a_folder_that_is_too_small_for_all(scheduler, folder, model, tokenizer):
    one = scheduler()
    run(one, [Caller(LONG)])
    close(one)
    size = next(folder.glob("*.safetensors")).stat().st_size
    small = [scheduler(prompts=PromptCache(folder, "m", 3 * size)) for _ in range(2)]
    callers = [Caller([20 + i, *LONG[: 40 + i % 9]], new=4) for i in range(10)]
    threads = [
        threading.Thread(target=run, args=(server, callers[index::2]), kwargs={"every": 6})
        for index, server in enumerate(small)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in small:
        close(server)
    assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= 3 * size
    assert not list(folder.glob("*.writing"))
    for caller in callers:
        assert caller.ids == plain(model, tokenizer, caller)


class Slow(PromptCache):
    """A folder whose disk answers when it is told to."""

    def __init__(self, folder):
        super().__init__(folder, "m")
        self.go, self.calls = threading.Event(), []

    def find(self, kind, ids, held=0):
        self.calls.append("find")
        assert self.go.wait(60)
        return super().find(kind, ids, held)

    def store(self, cache, ids):
        self.calls.append("store")
        assert self.go.wait(60)
        return super().store(cache, ids)


def test_no_stream_waits_for_the_disk(scheduler, folder):
    slow = Slow(folder)
    server = scheduler(prompts=slow)
    talking, late = Caller([5, 6], new=90), Caller(LONG, new=2)

    def steps(count):
        """Each of them gives the stream an id."""
        for _ in range(count):
            before = len(talking.ids)
            server.admit()
            server.step()
            assert len(talking.ids) == before + 1

    slow.go.set()
    server.submit(talking.ticket)
    while not talking.ids:
        server.admit()
        server.step()
    slow.go.clear()
    server.submit(late.ticket)
    steps(10)
    assert (slow.calls, late.ids) == (["find"] * 2, [])  # the folder has not answered
    slow.go.set()
    while not late.ids:
        steps(1)
    slow.go.clear()
    steps(10)
    assert slow.calls == ["find", "find", "store"]  # begun, and not done
    assert late.end.new_tokens == 2
    slow.go.set()
    run(server, [])


def test_an_id_is_chosen_although_the_folder_cannot_be_written(scheduler, folder, recwarn):
    server = scheduler()
    run(server, [Caller([3, 4])])
    shutil.rmtree(folder)
    folder.write_text("somebody's file")
    run(server, [first := Caller(LONG)])
    close(server)
    assert len(first.ids) == 12
    assert any("a prompt was not kept" in str(each.message) for each in recwarn)


def test_an_engine_keeps_its_texts_while_it_waits_and_counts_them(model, tokenizer, folder):
    with closing(Engine(model, tokenizer, LIMITS, prompts=PromptCache(folder, "m"))) as engine:
        for text in (LONG, LONG[1:], LONG[2:]):
            events = Events()
            engine.submit(Caller(text, new=4).request, events)
            list(events)
        until = time.monotonic() + 60
        while engine.counts.stored_prompts < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert engine.counts.stored_prompts >= 2
    assert len(list(folder.glob("*.safetensors"))) >= 2
