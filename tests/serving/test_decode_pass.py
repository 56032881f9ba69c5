"""Drafts in a server: fewer passes, the same ids; beside other requests, whatever these ask for."""

import pytest

import qmix
from qmix.generation.draft_length import DraftLength
from qmix.kernels.cpu.library import library
from qmix.models.offload import Tiers
from qmix.serving.limits import Limits
from qmix.serving.request import Piece
from qmix.serving.scheduler import Scheduler
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.callers import Caller, SlowMask, run
from tests.support.models import TINY, load_in_tiers, small_model

REPEATED = [7, 9, 30, 4, 11, 7, 9, 30, 4, 11, 7, 9]
SAMPLED = {"do_sample": True, "temperature": 0.4, "seed": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


@pytest.fixture
def always(monkeypatch):
    """Drafts as long as they may be, whatever they cost."""
    monkeypatch.setattr(DraftLength, "best", lambda self, matched, most, rows=1, ids=1.0: most)


def exact_model(rows=16, **options):
    """In float32, where no rounding of a batch reaches a choice, so that any rows are exact."""
    model = small_model(**options)
    model.exact_rows = lambda: rows
    return model


def repeats(ids, scores):
    """A processor that makes a text repeat itself, but for each ninth id: the model's own."""
    if ids.shape[1] % 9:
        scores = scores.clone()
        place = REPEATED.index(int(ids[0, -1])) if int(ids[0, -1]) in REPEATED else -1
        scores[:, REPEATED[(place + 1) % 5]] += 20.0
    return scores


def repeating(ids, *, processors=(), **options):
    return Caller(ids, processors=(repeats, *processors), **options)


def told(model, tokenizer, callers, *, speculate, slots=3, every=2, chunk=256):
    """What callers were told, and the counts."""
    limits = Limits(context=96, slots=slots, chunk=chunk)
    together = Scheduler(model, tokenizer, limits, speculate=speculate)
    run(together, callers, every=every)
    return together.counts


def assert_same(found, expected):
    assert found.ids == expected.ids
    assert found.end.finish == expected.end.finish
    assert found.end.stop == expected.end.stop
    assert found.end.expert_counts == expected.end.expert_counts
    pieces = [[e for e in each.events if isinstance(e, Piece)] for each in (found, expected)]
    assert [piece.text for piece in pieces[0]] == [piece.text for piece in pieces[1]]
    for one, other in zip(*pieces, strict=True):
        if other.logprob is not None:
            assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
            assert [i for i, _ in one.logprob.top] == [i for i, _ in other.logprob.top]


def by_history(ids, scores):
    """A processor that looks at all ids so far."""
    return scores if int(ids.sum()) % 5 else scores.roll(1, -1)


def mixed(text):
    """Requests of every kind, most of which repeat themselves."""
    return [
        repeating(REPEATED, new=40),
        repeating(REPEATED[2:], new=30, **SAMPLED),
        repeating([5, 6], new=20, expert_counts=True),
        repeating(REPEATED, new=40, top_logprobs=3, prompt_logprobs=True),
        repeating(REPEATED[1:], new=30, repetition_penalty=1.1),
        repeating(REPEATED, new=25, processors=(by_history,)),
        repeating(REPEATED[3:], new=30, mask=SlowMask(2), **SAMPLED),
        repeating(REPEATED, new=40, stop_strings=[text] if text else None),
        repeating(REPEATED, new=2),
        repeating(REPEATED, new=1),
    ]


@pytest.mark.parametrize(("slots", "chunk", "window"), [(1, 256, 8), (3, 4, None), (8, 256, 8)])
def test_the_ids_are_those_without_drafts(tokenizer, always, slots, chunk, window):
    model = exact_model(sliding_window=window, vocab_size=len(tokenizer))
    free = repeating(REPEATED, new=40)
    told(model, tokenizer, [free], speculate=False)
    text = "".join(event.text for event in free.events[:-1])[30:33]
    plain, drafted = mixed(text), mixed(text)
    before = told(model, tokenizer, plain, speculate=False, slots=slots, chunk=chunk)
    counts = told(model, tokenizer, drafted, speculate=True, slots=slots, chunk=chunk)
    for found, expected in zip(drafted, plain, strict=True):
        assert_same(found, expected)
    assert before.drafted_tokens == before.accepted_tokens == 0
    assert counts.drafted_tokens > counts.accepted_tokens > 0
    assert counts.decode_steps < before.decode_steps
    assert counts.new_tokens == before.new_tokens
    masks = [caller.request.mask for caller in (plain[6], drafted[6])]
    assert masks[0].seen == masks[1].seen == plain[6].ids[:-1]


@pytest.mark.parametrize("host", [None, 9])
def test_the_same_bits_where_the_compiled_kernels_take_every_row(tiny_nf4, tokenizer, always, host):
    """In memory, and with experts in their file."""
    if library().isa in (None, "portable"):
        pytest.skip("no compiled kernels")
    model, _ = qmix.load(tiny_nf4)
    if host is not None:
        model = load_in_tiers(tiny_nf4, "cpu", Tiers(device=0, host=host))
    text = "def area(width, height):\n    return width * height\n\n\n" * 2
    ids = tokenizer.encode(text + "def area(width")
    kinds = ({}, SAMPLED, {"repetition_penalty": 1.2})
    made = [
        [Caller([3 + i, *ids], new=32, top_logprobs=2, **kind) for i, kind in enumerate(kinds)]
        for _ in range(2)
    ]
    for callers, speculate in zip(made, (False, True), strict=True):
        counts = told(model, tokenizer, callers, speculate=speculate)
    for found, expected in zip(made[1], made[0], strict=True):
        assert found.events[:-1] == expected.events[:-1]
    assert counts.drafted_tokens > counts.accepted_tokens > 0


def test_no_more_rows_than_are_exact_and_none_where_one_is(tokenizer, always, monkeypatch):
    for exact, most in ((1, 3), (4, 4), (16, 16)):
        model, sizes = exact_model(exact), []
        whole = model.next_logits

        def counted(ids, *rest, whole=whole, sizes=sizes):
            if ids.shape[1] == 1:
                sizes.append(len(ids))
            return whole(ids, *rest)

        model.next_logits = counted
        callers = [repeating([3 + i, *REPEATED], new=20) for i in range(3)]
        counts = told(model, tokenizer, callers, speculate=True)
        assert max(sizes) == most
        assert (counts.drafted_tokens > 0) == (exact > 1)


def test_a_pass_with_drafts_that_fails_is_run_again_one_by_one(tokenizer, always):
    """As where memory is short for its rows."""
    model, failed = exact_model(), []
    whole = model.next_logits

    def short(ids, cache, *rest):
        if ids.shape[0] > 4:
            failed.append(len(ids))
            raise RuntimeError("not enough memory: you tried to allocate 1 byte")
        return whole(ids, cache, *rest)

    made = [[repeating([3 + i, *REPEATED], new=20) for i in range(3)] for _ in range(2)]
    told(model, tokenizer, made[0], speculate=False)
    model.next_logits = short
    told(model, tokenizer, made[1], speculate=True)
    assert failed
    for found, expected in zip(made[1], made[0], strict=True):
        assert_same(found, expected)


def test_what_leaves_in_the_middle_of_a_draft_leaves_a_cache_that_can_be_used(tokenizer, always):
    for window in (None, 8):
        model = exact_model(sliding_window=window)
        together = Scheduler(model, tokenizer, Limits(context=96, slots=2), speculate=True)
        leaving = repeating(REPEATED, new=60, mask=SlowMask(3))
        run(together, [Caller([50, 51], new=3)])
        together.submit(leaving.ticket)

        def to_the_middle(together=together):
            for _ in range(100):
                together.admit()
                together.step()
                if any(slot.late is not None and slot.drafts.verified for slot in together._slots):
                    return
            raise AssertionError("no mask was late in a draft")

        to_the_middle()
        other = Caller([*REPEATED, *leaving.ids[:2], 60], new=12)  # a copy of what it holds
        together.submit(other.ticket)
        to_the_middle()
        leaving.ticket.cancel()
        run(together, [])
        again = Caller([*REPEATED, *leaving.ids, 60], new=12)
        run(together, [again])
        assert again.end.cached_tokens == len(REPEATED) + len(leaving.ids)
        for caller in (other, again):
            alone = Caller(caller.request.ids, new=12)
            told(model, tokenizer, [alone], speculate=False)
            assert caller.ids == alone.ids


def test_the_rows_of_others_count():
    """With times that count the experts of the rows, or the rows alone."""
    for seconds, expected in (
        (lambda rows: 1 + 2.5 * (1 - 0.75 ** (rows - 1)), [15, 12, 8, 0]),
        (lambda rows: float(rows), [0, 0, 0, 0]),
    ):
        length = DraftLength()
        for rows in (1, 2, 4, 8, 12, 16):
            for _ in range(3):
                length.times.took(rows, seconds(rows))
        for _ in range(100):
            length.observe(8, accepted=True)
        found = [length.best(8, 16 - rows, rows, float(rows)) for rows in (1, 4, 8, 16)]
        assert found == expected


@pytest.mark.parametrize(("each", "drafts"), [(1.0, False), (0.0, True)])
def test_where_drafts_do_not_pay_none_are_made(tokenizer, each, drafts):
    """A pass here takes a time for each of its rows, or the same for all."""
    model, now = exact_model(), [0.0]
    whole = model.next_logits

    def slow(ids, *rest):
        now[0] += 1.0 + each * len(ids) ** 2
        return whole(ids, *rest)

    model.next_logits = slow
    together = Scheduler(model, tokenizer, Limits(context=96, slots=2))
    together._pass._clock = lambda: now[0]
    run(together, [repeating([3 + i, *REPEATED], new=40) for i in range(2)])
    counts = together.counts
    assert counts.accepted_tokens > 20 if drafts else counts.drafted_tokens <= 15
