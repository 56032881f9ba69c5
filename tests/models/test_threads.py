"""One model in several threads gives the text of one thread, whatever interrupts some of them."""

import os
import random
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, pairwise

import pytest
import torch

from qmix.errors import CheckpointError, UnsupportedError
from qmix.experts.policy import PRESETS
from qmix.experts.reader import ExpertReader
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from qmix.nn.moe import SparseMoeBlock
from tests.support.interruption import interrupted_after
from tests.support.models import load_in_tiers, quantized, small_model, threads
from tests.support.process import python
from tests.support.soak import both

PROMPTS = [
    torch.tensor([[1, 5, 6, 7, 8, 9]]),
    torch.tensor([[1, 40, 3]]),
    torch.arange(1, 43)[None] * 3 % 128,
    torch.tensor([[1, 5, 6, 7], [9, 20, 21, 22]]),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    small_model().to(torch.bfloat16).save_pretrained(folder / "dense")
    return quantized(folder / "dense", folder / "nf4")


def offloaded(directory, host=2):
    tiers = Tiers(device=0, host=host, settings=PRESETS["heat"])
    return load_in_tiers(directory, "cpu", tiers=tiers)


def resident(directory):
    return MixtralForCausalLM.from_pretrained(directory, device="cpu")


def text(model, prompt, **options):
    return model.generate(prompt, max_new_tokens=6, prefill_chunk_size=20, **options)


def together(*works):
    """Run each in a thread of its own, all at once; raises what the first of them raised."""
    ready = threading.Barrier(len(works))

    def run(work):
        ready.wait(60)
        return work()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            return [each.result() for each in [pool.submit(run, work) for work in works]]
    finally:
        sys.setswitchinterval(before)


def check_threads(model, expected, *, workers, generations):
    def work():
        for number in range(generations):
            index = number % len(PROMPTS)
            assert torch.equal(text(model, PROMPTS[index]), expected[index])

    together(*[work] * workers)


@pytest.mark.parametrize("make", [offloaded, resident])
def test_threads_get_the_text_of_one_thread(saved, make):
    expected = [text(resident(saved), prompt) for prompt in PROMPTS]
    check_threads(make(saved), expected, workers=4, generations=4)


@pytest.mark.soak
@pytest.mark.parametrize("make", [offloaded, resident])
def test_eight_threads_of_two_hundred_generations(saved, make):
    expected = [text(resident(saved), prompt) for prompt in PROMPTS]
    check_threads(make(saved), expected, workers=8, generations=200)


def test_streams_of_an_offloaded_model_interleave(saved):
    """Neither waits for the end of the other: each step lets the waiting thread go first."""
    model, order = offloaded(saved), []

    def work(name):
        for _ in range(3):
            text(model, PROMPTS[0], stopping_criteria=[lambda *_: order.append(name) or False])

    together(lambda: work("a"), lambda: work("b"))
    first = order[: len(order) // 2]
    assert {"a", "b"} <= set(first)
    assert sum(x != y for x, y in pairwise(order)) > 6


def test_statistics_and_passes_of_single_layers_may_run_beside_a_generation(saved):
    model, expected = offloaded(saved), text(resident(saved), PROMPTS[0])
    block = next(m for m in model.modules() if isinstance(m, SparseMoeBlock))
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        alone = block(x)[0]

    def single():
        for _ in range(20):
            with torch.no_grad():
                assert torch.equal(block(x)[0], alone)
            model.store.statistics()

    def whole():
        for _ in range(4):
            assert torch.equal(text(model, PROMPTS[0]), expected)

    together(single, whole, whole)


def test_a_step_that_fails_in_one_thread_leaves_the_others_their_text(saved, monkeypatch):
    model, expected = offloaded(saved), [text(resident(saved), prompt) for prompt in PROMPTS]
    real, reads = ExpertReader.read, count()

    def read(self, expert, blob):
        if next(reads) % 7 == 3:
            blob.random_(0, 256)
            raise CheckpointError("a read failed")
        return real(self, expert, blob)

    monkeypatch.setattr(ExpertReader, "read", read)

    def work():
        done = 0
        while done < 3:
            for prompt, wanted in zip(PROMPTS, expected, strict=True):
                with suppress(CheckpointError):
                    assert torch.equal(text(model, prompt), wanted)
                    done += 1

    together(work, work, work)
    monkeypatch.undo()
    assert torch.equal(text(model, PROMPTS[0]), expected[0])


@pytest.mark.slow
@both
def test_an_interruption_at_any_line_leaves_the_store_right(saved, soak):
    """As Ctrl-C does, an exception may come between any two lines of the store's own code."""
    model, expected = offloaded(saved), [text(resident(saved), prompt) for prompt in PROMPTS]
    lines = random.Random(0)

    for attempt in range(300 if soak else 12):
        index, file = attempt % len(PROMPTS), ("residency.py", "disk_store.py")[attempt % 2]
        with suppress(KeyboardInterrupt), interrupted_after(lines.randrange(1, 100), file):
            text(model, PROMPTS[index])
        again = (attempt + 1) % len(PROMPTS)
        (found,) = together(lambda again=again: text(model, PROMPTS[again]))
        assert torch.equal(found, expected[again]), attempt


def test_a_model_in_training_generates_in_evaluation_mode_in_every_thread():
    """The first generation that ends must not put the others back into training."""
    model = small_model(router_jitter_noise=0.5, attention_dropout=0.5)
    expected = text(model, PROMPTS[0])
    model.train()

    def work():
        for _ in range(5):
            assert torch.equal(text(model, PROMPTS[0]), expected)

    together(work, work, work)
    assert all(module.training for module in model.modules())


def test_streams_that_overlap_in_one_thread_share_the_evaluation_mode(tiny_nf4):
    from qmix import load

    model, _ = load(tiny_nf4, device="cpu")
    model.train()
    first, second = model.stream("Once", max_new_tokens=3), model.stream("Once", max_new_tokens=9)
    next(first)
    next(second)
    first.close()
    assert not model.training
    second.close()
    assert model.training


def test_threads_that_make_a_layers_structures_at_once_agree(saved):
    """A layer is made ready for the compiled kernels by whichever thread needs it first."""
    expected = [text(resident(saved), prompt) for prompt in PROMPTS]
    for _ in range(2):
        model = resident(saved)
        together(*[lambda m=model: check_all(m, expected)] * 4)


def check_all(model, expected):
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        assert torch.equal(text(model, prompt), wanted)


def in_a_fork(work):
    """What a forked child says: "done", or the name and text of the error. It gets 60 seconds."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking where threads live
        child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            work()
            said = "done"
        except Exception as error:  # noqa: BLE001  the parent asserts on it
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_a_forked_process_refuses_an_offloaded_model(saved):
    model = offloaded(saved)
    text(model, PROMPTS[0])
    said = in_a_fork(lambda: text(model, PROMPTS[0]))
    assert said.startswith("UnsupportedError: an offloaded model does not work in a forked process")
    assert "spawn" in said


def test_a_forked_process_refuses_to_wait_for_threads_that_it_does_not_have(saved):
    model = resident(saved)
    with threads(2):
        expected = text(model, PROMPTS[2])
        said = in_a_fork(lambda: text(model, PROMPTS[2]))
        passed = in_a_fork(lambda: model(PROMPTS[2]))

        def alone():
            torch.set_num_threads(1)
            assert torch.equal(text(model, PROMPTS[2]), expected)

        single = in_a_fork(alone)
    assert said.startswith("UnsupportedError: ")
    assert "a forked process would wait for threads" in said
    assert "torch.set_num_threads(1)" in said
    assert passed == said
    assert single == "done"


@pytest.mark.slow
def test_a_thread_may_generate_while_python_exits(saved):
    """Its reads can then no longer be given to other threads."""
    script = f"""
import threading, torch
from qmix.models.offload import Tiers
from tests.support.models import load_in_tiers
model = load_in_tiers({str(saved)!r}, "cpu", tiers=Tiers(device=0, host=2))
ids = torch.tensor([[1, 5, 6, 7]])
wanted = model.generate(ids, max_new_tokens=8)
first = threading.Event()
def work():
    first.set()
    for _ in range(20):
        assert torch.equal(model.generate(ids, max_new_tokens=8), wanted)
    print("the same")
threading.Thread(target=work).start()
first.wait()
"""
    done = python(script)
    assert done.stdout == "the same\n", done.stderr


def test_a_copy_is_at_home_in_the_process_that_makes_it(saved):
    import copy
    import pickle

    model = resident(saved)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(text(other, PROMPTS[0]), text(model, PROMPTS[0]))


def test_an_offloaded_model_says_so_before_it_waits(saved):
    """The refusal comes even where another thread held the turn at the fork."""
    model, holding = offloaded(saved), threading.Event()
    leave = threading.Event()

    def hold():
        model.store.in_turn(lambda: holding.set() or leave.wait(60))

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(60)
    said = in_a_fork(lambda: text(model, PROMPTS[0]))
    leave.set()
    thread.join()
    assert said.startswith(UnsupportedError.__name__)
