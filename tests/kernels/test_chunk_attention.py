"""A prompt's chunk on a CPU: two parts of the keys, merged, are plain softmax attention."""

import pytest
import torch

from qmix import kernels
from qmix.kernels import chunk_attention, kv_rows
from qmix.kernels.attention import attend_with, reference
from qmix.kernels.attention_mask import AttentionMask, visible
from tests.support.live_bytes import LiveBytes

HEADS, SHARED, WIDTH = 4, 2, 16


def tensors(queries, keys, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries + 1000 * keys)
    shapes = [
        (batch, heads, n, WIDTH) for heads, n in ((HEADS, queries), (SHARED, keys), (SHARED, keys))
    ]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def ragged(keys, *hidden):
    mask = torch.ones(len(hidden), keys, dtype=torch.bool)
    for row, columns in zip(mask, hidden, strict=True):
        row[columns] = False
    return mask


@pytest.fixture
def small_parts(monkeypatch):
    """Blocks of 5 queries, and two parts wherever all queries see 2 keys."""
    monkeypatch.setattr(chunk_attention, "_QUERIES", 5)
    monkeypatch.setattr(chunk_attention, "_LEAST_QUERIES", 2)
    monkeypatch.setattr(chunk_attention, "_LEAST_COMMON", 2)


@pytest.mark.parametrize("window", [None, 1, 4, 7, 13, 40])
@pytest.mark.parametrize(("queries", "keys"), [(2, 30), (5, 30), (12, 30), (30, 30), (5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_split_is_plain_softmax_attention(small_parts, window, queries, keys, dtype):
    q, k, v = tensors(queries, keys, dtype=dtype)
    left = slice(0, keys // 3)
    masks = (
        None,
        ragged(keys, slice(0, 0), left),  # rows of two lengths
        ragged(keys, left, slice(0, keys - 1)),  # queries that see nothing
        ragged(keys, slice(4, 6), slice(0, 0)),  # a hole
    )
    for padding_mask in masks:
        expected = reference(
            q.float(), k.float(), v.float(), visible(queries, keys, window, padding_mask)
        )
        found = attend_with("sdpa", q, k, v, AttentionMask(window, padding_mask))
        assert found.dtype == dtype
        most = 1e-5 if dtype == torch.float32 else 2e-2
        assert (found.float() - expected).abs().max() < most


def test_codes_take_the_same_way(small_parts):
    q, k, v = tensors(7, 40, dtype=torch.bfloat16)
    rows = [kv_rows.quantized(t) for t in (k, v)]
    numbers = [kv_rows.dequantized(t, torch.bfloat16) for t in rows]
    for mask in (
        AttentionMask(),
        AttentionMask(12),
        AttentionMask(None, ragged(40, slice(0, 9), [3])),
    ):
        assert torch.equal(
            attend_with("sdpa", q, *rows, mask), attend_with("sdpa", q, *numbers, mask)
        )


def test_merging_costs_no_more_than_rounding_the_output():
    q, k, v = tensors(64, 2112, batch=1, dtype=torch.bfloat16)
    exact = reference(q.double(), k.double(), v.double(), visible(64, 2112, None, None))
    error = (kernels.attend(q, k, v).double() - exact).norm()
    assert error < 2 * (exact.bfloat16().double() - exact).norm()


def test_inputs_that_are_not_numbers_stay_so(small_parts):
    q, k, v = tensors(4, 20)
    v[0, :, 3] = float("nan")
    out = kernels.attend(q, k, v)
    assert out[0].isnan().all()
    assert torch.isfinite(out[1]).all()


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    """Also where torch lays keys out anew for few threads, and not for many."""
    monkeypatch.setattr(chunk_attention, "_LEAST_COMMON", 512)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 8, 256, 64), (1, 4, 1024, 64), (1, 4, 1024, 64))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 16):
            torch.set_num_threads(threads)
            outs.append(
                [
                    kernels.attend(*(t.to(dtype) for t in inputs), AttentionMask(window))
                    for dtype in (torch.float32, torch.bfloat16)
                    for window in (None, 800)
                ]
            )
    finally:
        torch.set_num_threads(before)
    for out in outs[1:]:
        assert all(map(torch.equal, out, outs[0]))


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("padded", [False, True])
def test_memory_grows_with_the_keys_and_not_with_their_square(monkeypatch, window, padded):
    """Masks of all pairs would be four times as large for twice the tokens."""
    monkeypatch.setattr(chunk_attention, "_QUERIES", 128)
    monkeypatch.setattr(chunk_attention, "_LEAST_COMMON", 128)
    peaks = []
    for tokens in (1024, 2048):
        q, k, v = tensors(tokens, tokens, batch=1)
        mask = AttentionMask(window, ragged(tokens, slice(0, 3)) if padded else None)
        with LiveBytes() as live:
            kernels.attend(q, k, v, mask)
        peaks.append(live.peak)
    assert peaks[1] < 2.2 * peaks[0]
