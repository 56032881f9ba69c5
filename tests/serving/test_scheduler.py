"""Requests that run together give the ids they give alone; slots, queue and faults."""

import pytest
import torch

import qmix
from qmix.errors import QmixError, UsageError
from qmix.experts.policy import PRESETS
from qmix.generation.config import GenerationConfig
from qmix.models.offload import Tiers
from qmix.nn.cache_slab import CacheSlab
from qmix.serving.limits import Limits
from qmix.serving.request import BusyError, Ended, Request, Ticket
from qmix.serving.running import Running
from qmix.serving.scheduler import Scheduler
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.callers import PROMPTS, Caller, SlowMask, alone, run
from tests.support.models import TINY, load_in_tiers, small_model


@pytest.fixture(scope="module")
def model():
    """In float32, where no rounding of a batch reaches a choice."""
    return small_model()


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


@pytest.fixture
def scheduler(model, tokenizer):
    def made(**limits):
        return Scheduler(model, tokenizer, Limits(**{"context": 64, **limits}))

    return made


@pytest.mark.parametrize(("slots", "chunk"), [(3, 1), (8, 4), (1, 256)])
def test_requests_that_join_and_leave_give_the_ids_of_one_alone(model, scheduler, slots, chunk):
    callers = [Caller(ids, new=6 + 3 * (i % 3)) for i, ids in enumerate(PROMPTS)]
    run(scheduler(slots=slots, chunk=chunk), callers, every=2)
    for caller, ids in zip(callers, PROMPTS, strict=True):
        assert caller.ids == alone(model, ids, len(caller.ids))
        assert caller.end.finish == "length"
        assert caller.end.new_tokens == len(caller.ids)


def test_a_seed_gives_its_ids_whatever_runs_beside_it(scheduler):
    options = {"do_sample": True, "temperature": 1.5, "seed": 7}
    one = Caller(PROMPTS[1], **options)
    run(scheduler(slots=1), [one])
    callers = [Caller(ids, **{**options, "seed": 9}) for ids in PROMPTS[2:5]]
    again = Caller(PROMPTS[1], **options)
    run(scheduler(slots=4), [*callers, again])
    assert again.ids == one.ids
    assert len({tuple(c.ids) for c in callers}) == 3


def test_a_conversation_that_goes_on_is_read_from_where_it_was(scheduler):
    together = scheduler(slots=2)
    first = Caller(PROMPTS[5])
    other = Caller([60, 61])
    run(together, [first, other])
    longer = [*PROMPTS[5], *first.ids, 50, 51]
    second = Caller(longer)
    run(together, [second])
    assert second.end.cached_tokens == len(PROMPTS[5]) + len(first.ids) - 1
    fresh = Caller(longer)
    run(scheduler(), [fresh])
    assert fresh.end.cached_tokens == 0
    assert second.ids == fresh.ids
    assert together.counts.cached_tokens == second.end.cached_tokens


def test_a_prompt_that_many_ask_for_at_once_is_read_once(model, scheduler):
    together = scheduler(slots=4, chunk=8)
    callers = [Caller(PROMPTS[5]) for _ in range(4)]
    run(together, callers[:1])
    fresh = scheduler(slots=4, chunk=8)
    for caller in (same := [Caller(PROMPTS[5]) for _ in range(4)]):
        fresh.submit(caller.ticket)
    run(fresh, [])
    assert [c.end.cached_tokens for c in same] == [0] + [len(PROMPTS[5]) - 1] * 3
    assert all(c.ids == callers[0].ids for c in same)


@pytest.mark.parametrize("shared", [1, 7, 8])
def test_what_any_two_prompts_share_is_read_anew_and_changes_no_bit(scheduler, shared):
    server, text = scheduler(slots=1), PROMPTS[5]
    first, again = Caller(text, top_logprobs=2), Caller(text, top_logprobs=2)
    run(server, [first, Caller([*text[:shared], 60, 61]), again], every=20)
    assert again.end.cached_tokens == (shared if shared >= 8 else 0)
    if shared < 8:
        assert again.events[:-1] == first.events[:-1]


def test_a_new_conversation_copies_what_it_shares_and_leaves_the_old_one(scheduler):
    together = scheduler(slots=2)
    system = PROMPTS[5]
    first = Caller([*system, 50, 51])
    run(together, [first])
    other = Caller([*system[:10], 60])
    run(together, [other])
    assert other.end.cached_tokens == 10
    again = Caller([*first.request.ids, *first.ids, 70])
    run(together, [again])
    assert again.end.cached_tokens == len(first.request.ids) + len(first.ids) - 1


def test_a_prompt_that_is_held_whole_still_gives_its_first_logits(scheduler):
    together = scheduler(slots=1)
    first, again = Caller(PROMPTS[2]), Caller(PROMPTS[2])
    run(together, [first])
    run(together, [again])
    assert again.end.cached_tokens == len(PROMPTS[2]) - 1
    assert again.ids == first.ids


def test_a_stream_waits_for_a_chunk_at_most(scheduler):
    together = scheduler(slots=2, chunk=4)
    talking, long = Caller([5, 6], new=40), Caller(PROMPTS[5])
    together.submit(talking.ticket)
    together.admit()
    together.step()
    together.submit(long.ticket)
    before = len(talking.ids)
    for steps in range(1, 8):
        together.admit()
        together.step()
        assert len(talking.ids) == before + steps
    assert not long.ids
    together.step()
    assert long.ids


def test_who_leaves_frees_the_slot_at_once(scheduler):
    together = scheduler(slots=1)
    leaving, waiting, never = Caller([5], new=50), Caller([6], new=2), Caller([7])
    for caller in (leaving, waiting, never):
        together.submit(caller.ticket)
    together.admit()
    together.step()
    leaving.ticket.cancel()
    never.ticket.cancel()
    run(together, [])
    assert leaving.end.finish == never.end.finish == "cancelled"
    assert never.ids == []
    assert waiting.end.finish == "length"
    assert together.counts.cancelled == 2
    assert together.counts.running == together.counts.waiting == 0


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs(scheduler, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("qmix.serving.request.time.monotonic", lambda: now[0])
    together = scheduler(slots=1)
    running, waiting = Caller([5], new=50, deadline_s=2), Caller([6], deadline_s=1)
    together.submit(running.ticket)
    together.submit(waiting.ticket)
    together.admit()
    together.step()
    now[0] = 1.0
    together.admit()
    assert waiting.end.finish == "deadline"
    now[0] = 2.0
    together.admit()
    assert running.end.finish == "deadline"
    assert running.end.elapsed_s == 2.0
    assert len(running.ids) == running.end.new_tokens > 0


def test_the_queue_is_bounded_and_served_by_arrival(scheduler):
    together = scheduler(slots=1, waiting=2)
    callers = [Caller([5], new=2), Caller([6], new=2), Caller([7], new=2)]
    for caller in callers:
        together.submit(caller.ticket)
    with pytest.raises(BusyError, match="at most 2"):
        together.submit(Caller([8]).ticket)
    assert together.counts.refused == 1
    ends = []
    for caller in callers:
        caller.ticket._listener = lambda event, c=caller: (
            ends.append(c) if isinstance(event, Ended) else None
        )
    run(together, [])
    assert ends == callers


def test_what_does_not_fit_is_refused_before_it_waits(scheduler):
    together = scheduler()
    with pytest.raises(UsageError, match="at most 63 tokens; found 64 tokens"):
        together.submit(Caller([5] * 64).ticket)
    with pytest.raises(UsageError, match="vocabulary"):
        together.submit(Caller([10**6]).ticket)
    with pytest.raises(UsageError, match="an empty prompt"):
        Request(())
    for wrong in ([2**64], [1.5], ["a"]):
        with pytest.raises(UsageError, match="not token ids"):
            Caller(wrong)
    with pytest.raises(UsageError, match="slots"):
        scheduler(slots=17)
    assert together.idle


def test_a_context_that_is_full_ends_with_length(scheduler):
    together = scheduler(context=20)
    caller = Caller(PROMPTS[2], new=50)
    run(together, [caller])
    assert len(caller.ids) == 3
    assert caller.end.finish == "length"


def test_a_fault_of_one_request_ends_that_one_alone(model, scheduler):
    def broken(ids, scores):
        return scores * float("nan")

    def raising(ids, scores):
        raise ValueError("my own fault")

    together = scheduler(slots=4)
    nan, wrong = Caller([5, 6], processors=(broken,)), Caller([7], processors=(raising,))
    good = Caller(PROMPTS[1])
    run(together, [nan, good, wrong])
    assert "non-finite" in str(nan.end.error)
    assert "my own fault" in str(wrong.end.error)
    assert nan.end.finish == wrong.end.finish == "error"
    assert good.ids == alone(model, PROMPTS[1])
    assert together.counts.failed == 2
    after = Caller([5, 6])
    run(together, [after])
    assert after.end.cached_tokens == 0
    assert after.ids == alone(model, [5, 6])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
@pytest.mark.parametrize("where", ["slot", "prompt"])
def test_memory_that_ends_for_one_request_ends_that_one_alone(
    model, scheduler, monkeypatch, where, error
):
    """Where it is given a slot, or where its prompt is read."""
    together = scheduler(slots=3, chunk=4)
    large, good = Caller(PROMPTS[5]), Caller(PROMPTS[1])
    running, chunk = Running, model.next_logits

    def no_slot(ticket, *rest, **options):
        if ticket is large.ticket:
            raise error
        return running(ticket, *rest, **options)

    def no_chunk(ids, cache, *rest):
        if cache.length == 8 and ids.shape == (1, 4):  # of the large prompt alone
            raise error
        return chunk(ids, cache, *rest)

    if where == "slot":
        monkeypatch.setattr("qmix.serving.scheduler.Running", no_slot)
    else:
        monkeypatch.setattr(model, "next_logits", no_chunk)
    run(together, [good, large])
    assert large.end.finish == "error"
    assert "memory" in str(large.end.error)
    assert good.ids == alone(model, PROMPTS[1])
    assert (together.counts.failed, together.counts.running, together.counts.waiting) == (1, 0, 0)
    monkeypatch.undo()
    again = Caller(PROMPTS[5])
    run(together, [again])
    assert again.ids == alone(model, PROMPTS[5])


def test_a_row_without_a_number_ends_that_request_alone(model, scheduler, monkeypatch):
    together = scheduler(slots=3)
    callers = [Caller(ids) for ids in PROMPTS[:3]]
    whole = model.next_logits

    def broken(ids, cache, *rest):
        logits = whole(ids, cache, *rest)
        if len(logits) == 3:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(model, "next_logits", broken)
    run(together, callers, every=1)
    ends = [caller.end.finish for caller in callers]
    assert sorted(ends) == ["error", "length", "length"]
    (failed,) = (caller for caller in callers if caller.end.finish == "error")
    assert "non-finite" in str(failed.end.error)
    for caller, ids in zip(callers, PROMPTS, strict=False):
        if caller is not failed:
            assert caller.ids == alone(model, ids)


def test_a_step_that_fails_together_is_run_one_by_one(model, scheduler, monkeypatch):
    """As where memory is short for a batch: each goes on alone, but for the one that cannot."""
    together = scheduler(slots=3)
    callers = [Caller(ids) for ids in PROMPTS[:3]]
    for caller in callers:
        together.submit(caller.ticket)
    together.admit()
    together.step()
    real, bad = model.next_logits, []

    def short(ids, cache, *rest):
        if ids.shape[0] > 1 or (not bad and ids.shape == (1, 1) and bad.append(1) is None):
            raise RuntimeError("not enough memory: you tried to allocate 1 byte")
        return real(ids, cache, *rest)

    monkeypatch.setattr(model, "next_logits", short)
    run(together, [])
    finishes = sorted(caller.end.finish for caller in callers)
    assert finishes == ["error", "length", "length"]
    for caller, ids in zip(callers, PROMPTS, strict=False):
        if caller.end.finish == "length":
            assert caller.ids == alone(model, ids)


def test_a_lost_device_ends_all_and_says_why(model, scheduler, monkeypatch):
    together = scheduler(slots=2)
    callers = [Caller(ids) for ids in PROMPTS[:3]]
    for caller in callers:
        together.submit(caller.ticket)
    together.admit()

    def lost(*_):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(model, "next_logits", lost)
    with pytest.raises(QmixError, match="GPU"):
        together.step()
    assert {caller.end.finish for caller in callers} == {"error"}


def test_log_probabilities_are_those_of_the_logits(model, scheduler):
    caller = Caller(PROMPTS[2], top_logprobs=3, prompt_logprobs=True, new=4)
    run(scheduler(chunk=5), [caller])
    ids = torch.tensor([[*PROMPTS[2], *caller.ids]])
    expected = model(ids).logits[0].detach().log_softmax(-1)
    told = [*caller.end.prompt_logprobs, *(e.logprob for e in caller.events[:-1])]
    assert [one.id for one in told] == ids[0, 1:].tolist()
    for position, one in enumerate(told):
        row = expected[position]
        assert one.logprob == pytest.approx(float(row[one.id]), abs=1e-4)
        values = row.topk(3).values.tolist()
        assert [value for _, value in one.top] == pytest.approx(values, abs=1e-4)
    assert caller.end.cached_tokens == 0


def test_stop_strings_are_cut_and_reported(model, scheduler, tokenizer):
    whole = Caller(PROMPTS[1], new=20)
    run(scheduler(), [whole])
    text = "".join(event.text for event in whole.events[:-1])
    stop = next(text[i : i + 2] for i in range(4, len(text) - 2) if text[i : i + 2].isprintable())
    caller = Caller(PROMPTS[1], new=20, stop_strings=[stop])
    run(scheduler(), [caller])
    assert caller.end.finish == "stop"
    assert "".join(event.text for event in caller.events[:-1]) == text[: text.index(stop)]


def test_a_listener_that_raises_has_left(scheduler):
    def gone(event):
        raise BrokenPipeError

    together = scheduler(slots=2)
    other = Caller([6])
    together.submit(Ticket(Request((5,), GenerationConfig(max_new_tokens=50)), gone))
    run(together, [other])
    assert other.end.finish == "length"
    assert together.counts.cancelled == 1


@pytest.mark.parametrize("kv", ["16", "int8"])
def test_ids_of_4_bit_weights_do_not_depend_on_the_company(tiny_nf4, tokenizer, kv):
    """In bfloat16: the steps of a batch compute what the steps of one row do."""
    model, _ = qmix.load(tiny_nf4, kv=kv)
    limits = Limits(context=64, slots=8)
    prompts = [[100 + index, *ids] for index, ids in enumerate(PROMPTS)]  # they share nothing
    callers = [Caller(ids) for ids in prompts]
    run(Scheduler(model, tokenizer, limits), callers)
    for caller, ids in zip(callers, prompts, strict=True):
        assert caller.ids == alone(model, ids)


@pytest.mark.parametrize("window", [None, 8])
def test_slots_of_one_storage_as_on_a_gpu_give_the_same_ids(tokenizer, monkeypatch, window):
    model, steps = small_model(sliding_window=window), []
    whole = model.next_logits

    def new_rows(rows, positions):
        return CacheSlab(model.config, rows, positions, dtype=model.dtype, device=model.device).rows

    def counted(ids, *rest):
        steps.append(len(ids))
        return whole(ids, *rest)

    monkeypatch.setattr(model, "new_rows", new_rows)
    monkeypatch.setattr(model, "next_logits", counted)
    together = Scheduler(model, tokenizer, Limits(context=64, slots=3, chunk=8))
    assert steps == [1, 2, 3]  # before anybody asks
    callers = [Caller(ids) for ids in (*PROMPTS[:5], [*PROMPTS[4], 3])]
    run(together, callers, every=2)
    assert [c.ids for c in callers] == [alone(model, c.request.ids) for c in callers]


def test_experts_that_stay_in_the_file_give_the_same_ids(tiny_nf4, tokenizer):
    """Of 24 experts 5 fit into memory; the engine's steps fetch the others."""
    tiers = Tiers(device=0, host=5, settings=PRESETS["heat"])
    offloaded, (resident, _) = load_in_tiers(tiny_nf4, "cpu", tiers=tiers), qmix.load(tiny_nf4)
    found = []
    for model in (offloaded, resident):
        callers = [Caller(ids, new=5) for ids in PROMPTS[1:4]]
        run(Scheduler(model, tokenizer, Limits(context=64, slots=3, chunk=8)), callers)
        found.append([caller.ids for caller in callers])
    assert found[0] == found[1]
    assert offloaded.store.statistics().disk_bytes > 0


def test_a_rolling_window_keeps_its_rows_apart(tokenizer):
    model = small_model(sliding_window=8)
    callers = [Caller(ids, new=14) for ids in PROMPTS]
    run(Scheduler(model, tokenizer, Limits(context=64, slots=3, chunk=5)), callers, every=3)
    for caller, ids in zip(callers, PROMPTS, strict=True):
        assert caller.ids == alone(model, ids, 14)


def experts_of(model, prompt, ids):
    """New ids that each expert computed, from one pass over all of them."""
    logits = model(torch.tensor([[*prompt, *ids]]), output_router_logits=True).router_logits
    chosen = torch.stack(logits)[:, len(prompt) - 1 : -1].topk(2, -1).indices
    experts = range(model.config.num_local_experts)
    return tuple(tuple(int((layer == one).sum()) for one in experts) for layer in chosen)


@torch.no_grad()
def test_experts_are_counted_for_the_requests_that_ask_and_change_no_ids(model, scheduler):
    callers = [
        Caller(ids, new=4 + 2 * i, expert_counts=i != 1, prompt_logprobs=i == 3)
        for i, ids in enumerate(PROMPTS[2:6])
    ]
    run(scheduler(slots=3, chunk=8), callers, every=2)
    for index, (caller, ids) in enumerate(zip(callers, PROMPTS[2:6], strict=True)):
        assert caller.ids == alone(model, ids, len(caller.ids))
        expected = experts_of(model, ids, caller.ids) if index != 1 else ()
        assert caller.end.expert_counts == expected


def test_slots_say_what_they_do(scheduler):
    together = scheduler(slots=2, chunk=8)
    together.submit(Caller(PROMPTS[2], new=3).ticket)
    together.admit()
    together.step()
    assert [slot.state for slot in together.slots].count("reading") == 1
    together.step()
    together.step()
    (busy,) = (slot for slot in together.slots if slot.state != "free")
    assert (busy.state, busy.prompt_tokens, busy.new_tokens) == ("writing", len(PROMPTS[2]), 2)
    together.step()
    assert [slot.state for slot in together.slots] == ["free", "free"]
    assert max(slot.held_tokens for slot in together.slots) == len(PROMPTS[2]) + 2


def test_a_mask_that_is_late_holds_up_nobody_else(model, scheduler):
    slow, other = Caller(PROMPTS[4], mask=SlowMask(3)), Caller(PROMPTS[1], new=12)
    together = scheduler(slots=2, chunk=4)
    for caller in (slow, other):
        together.submit(caller.ticket)
    for _ in range(20):
        if other.events and isinstance(other.events[-1], Ended):
            break
        together.admit()
        together.step()
    assert 0 < len(slow.ids) < len(other.ids) == 12
    run(together, [])
    assert slow.ids == alone(model, PROMPTS[4])
    assert other.ids == alone(model, PROMPTS[1])
    assert slow.request.mask.seen == slow.ids[:-1]
    assert slow.request.mask.waits > 0  # once it was alone


def test_a_request_may_end_while_its_mask_is_late(scheduler):
    slow = Caller(PROMPTS[4], mask=SlowMask(10**9))
    other = Caller(PROMPTS[1])
    together = scheduler(slots=2)
    run(together, [other])
    together.submit(Caller(PROMPTS[2]).ticket)
    together.submit(slow.ticket)
    for _ in range(4):
        together.admit()
        together.step()
    slow.ticket.cancel()
    run(together, [])
    assert slow.end.finish == "cancelled"
    again = Caller(PROMPTS[4])
    run(together, [again])
    assert len(again.ids) == 12
