"""Triton attention and pointwise kernels against the reference backends, interpreted or on a GPU.

Run by test_triton_attention.py in a process of its own with TRITON_INTERPRET=1: the flag is read
when a kernel is defined. On a machine with a GPU: python -m pytest
tests/kernels/interpreted_attention.py. Fresh tensors are filled with NaN, so that what a kernel
forgets to write shows; so are all slots of a cache that no query may see.

Tolerances, in the norm of the error relative to the oracle's. In float32 only the order of
additions and exp2 for exp differ: ORDER_BOUND. In 16 bits the oracle is float32 over the same
inputs, and attention differs by two roundings to nearest, of the dtype's ROUNDING each and
independent from element to element: of the softmax's weights before they multiply values, and of
the result. The pointwise kernels round where the reference rounds, or less often: against it in
the same dtype a residual, a norm after it and a rotation differ by at most two, four and four
roundings, where a sum that falls on the other side of a tie counts as one.
"""

import pytest
import torch
from torch.nn import functional as F

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.errors import UnsupportedError
from qmix.kernels import attention as rows
from qmix.kernels import kv_rows
from qmix.kernels.gpu import attention as gpu
from qmix.kernels.gpu import pointwise
from qmix.nn.cache import KVCache
from tests.support.interpreter import (
    CONVERSIONS,
    DEVICE,
    DTYPES,
    ROUNDING,
    drawn,
    error,
    skip_without_a_device,
)
from tests.support.models import small_model
from tests.support.soak import one_in

skip_without_a_device()
ORDER_BOUND = 1e-5
HALF = ROUNDING[torch.float16]
SMALL = gpu.Tuning(columns=16)  # tiles have edges at 16, 32, ...

pytestmark = [CONVERSIONS, pytest.mark.usefixtures("poison")]


def bound(dtype):
    return max(ORDER_BOUND, 2 * ROUNDING[dtype])


def half_bound(dtype=torch.float32):
    """Of what is float16 in the end, and was of this dtype before."""
    return 2 * max(HALF, ROUNDING[dtype])


def oracle(q, k, v, window, padding_mask):
    """The reference, float32; keys of columns that are not kept are put to zero, NaN or not."""
    if padding_mask is not None:
        k, v = (t.masked_fill(~padding_mask[:, None, :, None], 0.0) for t in (k, v))
    mask = kernels.visible(q.shape[2], k.shape[2], window, padding_mask, q.device)
    return rows.reference(q.float(), k.float(), v.float(), mask)


def padding(batch, length, holes=False):
    """The first row has no padding, the others more and more on the left; the last maybe inside."""
    padding_mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        padding_mask[row, : row * length // batch] = False
    if holes:
        padding_mask[-1, length // 2 :: 3] = False
    return padding_mask.to(DEVICE)


GROUP_HEADS = (1, 2, 4)  # query heads of a key-value head
LENGTHS = (1, 2, 15, 16, 17, 33)


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 7, 8, 16])
def test_attend(window, length, dtype):
    """One query, some at the end of a cache, and all: at every block edge and window edge."""
    group_heads = GROUP_HEADS[length % 3]
    k, v = (
        drawn(2, 2, length, 32, seed=2, dtype=dtype),
        drawn(2, 2, length, 32, seed=3, dtype=dtype),
    )
    for queries in sorted({1, (length + 1) // 2, length}):
        q = drawn(2, 2 * group_heads, queries, 32, dtype=dtype)
        out = gpu.attend(q, k, v, window=window, padding_mask=None, tuning=SMALL)
        assert out.dtype == dtype
        assert error(out, oracle(q, k, v, window, None)) <= bound(dtype)


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 8])
@pytest.mark.parametrize("length", [16, 35])
def test_padding(length, window, dtype):
    """A query that sees no key gives zeros; what lies at padding, here huge, does not leak."""
    padding_mask = padding(3, length, holes=True)
    poisoned = ~padding_mask[:, None, :, None]
    k = drawn(3, 1, length, 16, seed=2, dtype=dtype).masked_fill(poisoned, 6e4)
    v = drawn(3, 1, length, 16, seed=3, dtype=dtype).masked_fill(poisoned, 6e4)
    for queries in (1, length):
        q = drawn(3, 2, queries, 16, dtype=dtype)
        out = gpu.attend(q, k, v, window=window, padding_mask=padding_mask, tuning=SMALL)
        expected = oracle(q, k, v, window, padding_mask)
        assert error(out, expected) <= bound(dtype)
        blind = ~rows.visible(queries, length, window, padding_mask).any(-1)[:, 0]
        assert blind.any() == (queries > 1 or (not padding_mask[:, -1].all() and window == 1))
        assert out.transpose(1, 2)[blind].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2])
def test_two_groups_of_mixtrals_heads(queries, dtype):
    q = drawn(1, 8, queries, 128, dtype=dtype)
    k, v = drawn(1, 2, 67, 128, seed=2, dtype=dtype), drawn(1, 2, 67, 128, seed=3, dtype=dtype)
    out = gpu.attend(q, k, v, window=None, padding_mask=None)
    assert error(out, oracle(q, k, v, None, None)) <= bound(dtype)


def test_tensors_as_a_layer_has_them():
    """Strided inputs: heads behind positions, as a projection leaves them, and a slice."""
    q, k, v = (drawn(2, 20, heads, 32, seed=heads).transpose(1, 2) for heads in (4, 2, 2))
    expected = oracle(q, k, v, 8, None)
    assert error(gpu.attend(q, k, v, window=8, padding_mask=None), expected) <= ORDER_BOUND
    longer = torch.cat((k, torch.full_like(k, float("nan"))), 2)[:, :, :20]
    assert error(gpu.attend(q, longer, v, window=8, padding_mask=None), expected) <= ORDER_BOUND
    padding_mask = padding(2, 30)[:, -20:]
    out = gpu.attend(q, k, v, window=8, padding_mask=padding_mask)
    assert error(out, oracle(q, k, v, 8, padding_mask)) <= ORDER_BOUND


def test_large_scores_do_not_overflow():
    q, k, v = (drawn(1, 2, 40, 16, seed=seed) for seed in (1, 2, 3))
    q = q * 300
    out = gpu.attend(q, k, v, window=None, padding_mask=None, tuning=SMALL)
    # exp of scores around 1000: their rounding, 1000 * 2^-24, is relative to the weights.
    assert error(out, oracle(q, k, v, None, None)) <= 20 * ORDER_BOUND


def ring(k, slots, past, *, reach=None, starts=None):
    """Columns [B, G, L, d] as they lie in a ring after `past` [B] of each row.

    NaN is whatever no query may see: empty slots, columns older than `reach`, padding.
    """
    out = torch.full(
        (*k.shape[:2], slots, k.shape[3]), float("nan"), device=k.device, dtype=k.dtype
    )
    for row, length in enumerate(past.tolist()):
        oldest = max(0, length - min(slots, reach or slots))
        for column in range(max(oldest, 0 if starts is None else int(starts[row])), length):
            out[row, :, column % slots] = k[row, :, column]
    return out


def one_by_one(q, k, v, past, starts, window):
    """The oracle row by row: rows [B, S, H, d] of their own length and padding."""
    out = []
    for row, before in enumerate(past.tolist()):
        end = before + q.shape[1]
        padding_mask = torch.arange(end, device=q.device)[None] >= (
            0 if starts is None else starts[row]
        )
        cut = (t[row : row + 1, :, :end] for t in (k, v))
        out.append(oracle(q[row : row + 1].transpose(1, 2), *cut, window, padding_mask))
    return torch.cat(out).transpose(1, 2)


@pytest.mark.parametrize("window", one_in(2, [None, 1, 7, 8, 16]))
def test_decode_over_a_cache(window):
    """Rows of different lengths and padding; the ring of W slots at every place of its turn."""
    past = torch.tensor([0, 6, 7, 8, 15, 16, 24, 40], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, 0, 3, 8, 2, 16, 0, 30], dtype=torch.int32, device=DEVICE)
    k, v = drawn(8, 1, 41, 16, seed=2), drawn(8, 1, 41, 16, seed=3)
    q = drawn(8, 1, 2, 16)
    expected = one_by_one(q, k, v, past, starts, window)
    outs = []
    for slots in (41, 48) if window is None else (window, 41, window + 3):
        keys, values = (ring(t, slots, past + 1, reach=window, starts=starts) for t in (k, v))
        outs.append(
            gpu.attend_cached(q, keys, values, past, starts=starts, window=window, tuning=SMALL)
        )
        assert error(outs[-1], expected) <= ORDER_BOUND
    narrow = gpu.splits_for(8, slots, 16, 8)
    assert narrow == 1  # the same shares for all: then the same bits wherever columns lie
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dtype", one_in(2, DTYPES), ids=str)
@pytest.mark.parametrize("window", [None, 8])
def test_codes_are_numbers(window, dtype):
    """A prompt and its last token over rows of codes, beside the numbers that they stand for."""
    k, v = (kv_rows.quantized(drawn(2, 2, 33, 32, seed=seed, dtype=dtype)) for seed in (2, 3))
    numbers = [kv_rows.dequantized(each, torch.float32) for each in (k, v)]
    for queries in (1, 33):
        q = drawn(2, 4, queries, 32, dtype=dtype)
        out = gpu.attend(q, k, v, window=window, padding_mask=None, tuning=SMALL)
        assert error(out, oracle(q, *numbers, window, None)) <= bound(dtype)


@pytest.mark.parametrize("window", [None, 24])
def test_a_step_makes_codes_of_its_key_and_value(window):
    """To the bit those of a cache; a row of zeros and one of NaN among them; split or not."""
    past, slots = torch.tensor([0, 23, 41], dtype=torch.int32, device=DEVICE), window or 64
    k, v = drawn(3, 2, 42, 32, seed=2), drawn(3, 2, 42, 32, seed=3)
    k[0, 0, 0] = 0.0
    codes = [kv_rows.quantized(each) for each in (k, v)]
    held = [ring(each, slots, past) for each in (k, v)]
    rings = [kv_rows.quantized(each) for each in held]
    new = [
        torch.stack([each[row, :, int(at)] for row, at in enumerate(past)])[:, :, None].contiguous()
        for each in (k, v)
    ]
    q = drawn(3, 1, 4, 32)
    out = gpu.attend_cached(q, *rings, past, window=window, tuning=SMALL, new=(new[0], new[1]))
    for found, expected in zip(rings, codes, strict=True):
        for row, at in enumerate(past.tolist()):
            assert torch.equal(found[row, :, at % slots], expected[row, :, at])
    numbers = [kv_rows.dequantized(each, torch.float32) for each in codes]
    assert error(out, one_by_one(q, *numbers, past, None, window)) <= ORDER_BOUND
    new[0][1, 1, 0, 3] = float("nan")
    out = gpu.attend_cached(q, *rings, past, window=window, tuning=SMALL, new=(new[0], new[1]))
    assert out[1, 0, 2:].isnan().all()
    assert out[1, 0, :2].isfinite().all()


@pytest.mark.parametrize("batch", one_in(5, [4, 1, 2, 8, 16]))
def test_batch_buckets(batch):
    """A row's result does not depend on who else is there; split or not."""
    past = torch.arange(batch, dtype=torch.int32, device=DEVICE) * 5 + 3
    k, v = drawn(16, 2, 96, 16, seed=2)[:batch], drawn(16, 2, 96, 16, seed=3)[:batch]
    q = drawn(16, 1, 4, 16)[:batch]
    keys, values = (ring(t, 96, past + 1) for t in (k, v))
    out = gpu.attend_cached(q, keys, values, past, tuning=SMALL)
    assert error(out, one_by_one(q, k, v, past, None, None)) <= ORDER_BOUND
    assert torch.equal(out, gpu.attend_cached(q, keys, values, past, tuning=SMALL))
    half = gpu.attend_cached(q, keys, values, past, tuning=SMALL, dtype=torch.float16)
    assert torch.equal(half, out.half())
    arrivals = torch.zeros(2 * batch, dtype=torch.int32, device=DEVICE)
    merged = gpu.attend_cached(q, keys, values, past, tuning=SMALL, arrivals=arrivals)
    assert torch.equal(merged, out)  # the last split merges as the launch of its own does
    assert not arrivals.any()  # for the next layer


@pytest.mark.diagonal
@pytest.mark.parametrize("window", [None, 7, 16])
@pytest.mark.parametrize("chunk", [1, 5, 16, 19])
def test_chunked_prefill(chunk, window):
    """Chunks of prompts up to 38 tokens, over a straight cache and over the smallest ring."""
    length = 38
    q, k, v = (
        drawn(2, length, 2, 16),
        drawn(2, 1, length, 16, seed=2),
        drawn(2, 1, length, 16, seed=3),
    )
    starts = torch.tensor([0, 9], dtype=torch.int32, device=DEVICE)
    reach = None if window is None else window + chunk - 1
    for slots in (length,) if reach is None else (length, reach):
        for before in range(0, length - chunk + 1, max(chunk, 6)):
            past = torch.tensor([before, max(before - 3, 0)], dtype=torch.int32, device=DEVICE)
            keys, values = (
                ring(t, slots, past + chunk, reach=reach, starts=starts) for t in (k, v)
            )
            part = q[:, before : before + chunk]
            out = gpu.attend_cached(
                part, keys, values, past, starts=starts, window=window, tuning=SMALL
            )
            assert error(out, one_by_one(part, k, v, past, starts, window)) <= ORDER_BOUND


def test_what_does_not_fit_is_refused():
    q = drawn(1, 2, 1, 24)
    with pytest.raises(UnsupportedError, match="heads of 24"):
        gpu.attend(q, q, q, window=None, padding_mask=None)
    q = drawn(1, 2, 1, 16)
    with pytest.raises(UnsupportedError, match="float16"):
        gpu.attend(q, q.half(), q.half(), window=None, padding_mask=None)
    with pytest.raises(UnsupportedError, match="gradients"):
        gpu.attend(q.requires_grad_(), q, q, window=None, padding_mask=None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [96, 128])
def test_rms_norm(width, dtype):
    x, weight = drawn(2, 3, width, dtype=dtype) * 5, drawn(width, seed=2, dtype=dtype)
    expected = kernels.rms_norm(x, weight, 1e-5)
    found = pointwise.rms_norm(x, weight, 1e-5)
    assert error(found, expected) <= 2 * bound(dtype)
    # Rounded where the reference rounds: only sums on the other side of a tie differ.
    assert dtype == torch.float32 or (found == expected).float().mean() >= 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("splits", "choices"), [(1, 1), (3, 2)])
def test_residual_norm_adds_what_a_product_left(splits, choices, dtype):
    x, weight = drawn(5, 96, dtype=dtype), drawn(96, seed=2, dtype=dtype)
    partials = drawn(splits, 5 * choices, 96, seed=3)
    added = partials.view(splits, 5, choices, 96).sum((0, 2)).to(dtype)
    total, normed = pointwise.residual_norm(x, partials, weight, 1e-5, dtype=torch.float16)
    assert (total.dtype, normed.dtype) == (dtype, torch.float16)
    assert error(total, x + added) <= bound(dtype)
    assert error(normed, kernels.rms_norm(x + added, weight, 1e-5)) <= 2 * half_bound(dtype)
    plain, _ = pointwise.residual_norm(x, added, weight, 1e-5)
    assert torch.equal(plain, x + added)


def same_routes(found, expected, logits):
    assert (found.ids.dtype, found.weights.dtype) == (torch.int64, torch.float32)
    assert error(found.weights, expected.weights) <= ORDER_BOUND
    assert torch.equal(logits.gather(1, found.ids), logits.gather(1, expected.ids))


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "chosen"), [(8, 2), (8, 1), (6, 3), (4, 4), (1, 1)])
def test_route(experts, chosen, dtype):
    logits = drawn(7, experts, dtype=dtype) * 3
    logits[3] = logits[3].sort().values * 30
    same_routes(pointwise.route(logits, chosen), kernels.route(logits, chosen), logits)


def test_equal_logits_choose_different_experts():
    routes = pointwise.route(torch.ones(3, 8, device=DEVICE), 3)
    assert torch.equal(routes.ids, torch.arange(3, device=DEVICE).expand(3, 3))
    assert torch.equal(routes.weights, torch.full((3, 3), 1 / 3, device=DEVICE))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum
def test_logits_that_are_no_numbers_choose_experts_that_exist():
    logits = drawn(3, 8)
    logits[1] = float("nan")
    logits[2, 3:] = float("-inf")
    routes = pointwise.route(logits, 4)
    assert ((routes.ids >= 0) & (routes.ids < 8)).all()
    assert torch.equal(routes.weights.isnan().any(1), torch.tensor([False, True, False]).to(DEVICE))
    assert len(set(routes.ids[2].tolist())) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_residual_norm_route(tokens, dtype):
    x, partials = drawn(tokens, 96, dtype=dtype), drawn(2, tokens, 96, seed=2)
    weight, gate = drawn(96, seed=3, dtype=dtype), drawn(8, 96, seed=4, dtype=dtype) / 8
    found = pointwise.residual_norm_route(x, partials, weight, 1e-5, gate, 2, dtype=torch.float16)
    total = x + partials.sum(0).to(dtype)
    normed = kernels.rms_norm(total, weight, 1e-5)
    assert error(found.total, total) <= bound(dtype)
    assert error(found.normed, normed) <= 2 * half_bound(dtype)
    # Of the logits too only the order of additions, and their own rounding.
    assert error(found.logits, F.linear(normed, gate)) <= 2 * bound(dtype)
    same_routes(found.routes, kernels.route(found.logits, 2), found.logits)


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (2, 3), (1, 19)])
def test_apply_rotary(batch, queries, dtype):
    x = drawn(batch, queries, 3, 16, dtype=dtype).transpose(1, 2)
    for rows_of in {1, batch}:
        positions = torch.randint(0, 5000, (rows_of, queries), device=DEVICE)
        cos, sin = kernels.rotary(positions, 16, 1e4, dtype)
        found = pointwise.apply_rotary(x, cos, sin)
        assert found.dtype == dtype
        assert error(found, kernels.apply_rotary(x, cos, sin)) <= 2 * bound(dtype)


def config(window):
    return MixtralConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=64, num_local_experts=4,
        sliding_window=window,
    )  # fmt: skip


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 6])
def test_rotate_store_writes_what_a_cache_holds(window, dtype):
    """Chunks and steps, past the ring's end twice, against KVCache and the reference's rotation."""
    cache = KVCache(config(window), 2, dtype=dtype, device=DEVICE)
    slots = 24 if window is None else window
    keys, values = torch.full((2, 2, 2, slots, 16), float("nan"), dtype=dtype, device=DEVICE)
    table = kernels.rotary(torch.arange(24, device=DEVICE)[None], 16, 1e4, dtype)
    starts = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    for new in (4, 1, 7, 1):
        length = cache.length
        splits = 1 + new % 3
        partials = drawn(splits, 2 * new, 8 * 16, seed=length)
        past = torch.full((2,), length, dtype=torch.int32, device=DEVICE)
        q = pointwise.rotate_store(
            partials, keys, values, *table, past, heads=4, starts=starts, dtype=dtype
        )
        heads = partials.sum(0).to(dtype).view(2, new, 8, 16).transpose(1, 2)
        positions = torch.arange(length, length + new, device=DEVICE)[None] - starts[:, None]
        cos, sin = kernels.rotary(positions.clamp(min=0), 16, 1e4, dtype)
        rotated = kernels.apply_rotary(heads[:, :6], cos, sin)
        cache.append(0, rotated[:, 4:], heads[:, 6:])
        cache.advance(new)
        assert q.shape == (2, new, 4, 16)
        assert error(q.transpose(1, 2), rotated[:, :4]) <= 3 * bound(dtype)
        held = torch.arange(length + new - cache.stored_length, length + new, device=DEVICE) % slots
        for found, expected in zip((keys, values), cache[0], strict=True):
            assert error(found[:, :, held], expected) <= 3 * bound(dtype)
    if window is None:
        assert keys[:, :, cache.length :].isnan().all()


def test_a_position_beyond_the_table_shows():
    keys, values = torch.zeros(2, 1, 1, 8, 16, device=DEVICE)
    cos, sin = kernels.rotary(torch.arange(4, device=DEVICE)[None], 16, 1e4, torch.float32)
    past = torch.tensor([3], dtype=torch.int32, device=DEVICE)
    partials = drawn(2, 4 * 16)
    q = pointwise.rotate_store(partials, keys, values, cos, sin, past, heads=2, dtype=torch.float32)
    assert torch.equal(q.isnan().flatten(2).all(-1)[0], torch.tensor([False, True]).to(DEVICE))
    assert not q[0, 0].isnan().any()


@pytest.mark.parametrize("window", one_in(2, [6, None]))
def test_a_model_says_the_same_tokens(window, monkeypatch):
    """A model generates with these kernels: its greedy tokens are those of the oracle."""
    model = small_model(
        hidden_size=64, intermediate_size=64, num_local_experts=4, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=window,
    ).to(DEVICE)  # fmt: skip
    prompt = torch.tensor([[3, 17, 90, 41, 8, 2, 11], [1, 1, 5, 60, 7, 33, 4]], device=DEVICE)
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0

    def greedy():
        return model.generate(prompt, attention_mask=mask, max_new_tokens=2, do_sample=False)

    def logits():
        return model(input_ids=prompt, attention_mask=mask).logits

    def attend(q, k, v, mask, *, dropout, implementation):
        assert not dropout
        assert mask.attn_mask is None
        calls.append(q.shape[2])
        return gpu.attend(q, k, v, window=mask.window, padding_mask=mask.padding_mask)

    calls = []
    with torch.no_grad():
        expected, expected_logits = greedy(), logits()
        for name in ("rms_norm", "apply_rotary", "route"):
            monkeypatch.setattr(kernels, name, getattr(pointwise, name))
        monkeypatch.setattr(kernels, "attend", attend)
        assert torch.equal(greedy(), expected)
        assert error(logits(), expected_logits) <= ORDER_BOUND
    assert calls == [7, 1, 7]
