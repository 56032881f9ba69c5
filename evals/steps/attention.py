"""Step `attention`: our kernels alone beside torch's SDPA and FlexAttention, with Mixtral's heads.

Knows nothing of a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.evals.steps.graph_timing import timed
from qmix.kernels.gpu import attention

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DECODE = ((1, 512), (1, 4096), (1, 32768), (8, 4096), (16, 4096))
PREFILL = ((512, None), (4096, None), (16384, None), (16384, 4096))  # (queries, window)
_CACHED_BYTES = 100 << 20  # twice the second-level cache of an H100


def results(device: torch.device) -> Iterator[dict[str, object]]:
    """One result for each kernel and shape."""
    for batch, keys in DECODE:
        yield from _decode(device, batch, keys)
    for queries, window in PREFILL:
        yield from _prefill(device, queries, window)


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def _decode(device: torch.device, batch: int, keys: int) -> Iterator[dict[str, object]]:
    size = 2 * batch * KV_HEADS * keys * HEAD_DIM * 2
    copies = max(2, -(-_CACHED_BYTES // size))
    q = _random(device, batch, 1, HEADS, HEAD_DIM)
    caches = [
        tuple(_random(device, batch, KV_HEADS, keys, HEAD_DIM) for _ in range(2))
        for _ in range(copies)
    ]
    past = torch.full((batch,), keys - 1, dtype=torch.int32, device=device)
    grouped = q.view(batch, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)

    def ours(k: Tensor, v: Tensor) -> Callable[[], object]:
        return lambda: attention.attend_cached(q, k, v, past)

    def theirs(k: Tensor, v: Tensor) -> Callable[[], object]:
        return lambda: F.scaled_dot_product_attention(grouped, k, v)

    for name, kernel in (("qmix", ours), ("torch SDPA, heads folded", theirs)):
        timing = timed([kernel(k, v) for k, v in caches])
        yield {
            "kernel": name,
            "shape": f"decode, batch {batch}, {keys} keys",
            **asdict(timing),
            "gigabytes_per_second": size / timing.microseconds / 1e3,
        }


def _prefill(device: torch.device, queries: int, window: int | None) -> Iterator[dict[str, object]]:
    q = _random(device, 1, HEADS, queries, HEAD_DIM)
    k, v = (_random(device, 1, KV_HEADS, queries, HEAD_DIM) for _ in range(2))
    pairs = queries * (queries + 1) // 2
    if window is not None:
        pairs -= (queries - window) * (queries - window + 1) // 2
    calls: dict[str, Callable[[], object]] = {
        "qmix": lambda: attention.attend(q, k, v, window=window, padding_mask=None)
    }
    if window is None:
        calls["torch SDPA"] = lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    else:
        calls["torch FlexAttention, compiled"] = _flex(q, k, v, window)
    for name, call in calls.items():
        shape = f"prefill {queries}" + (f", window {window}" if window else "")
        try:
            timing = timed([call])
        except Exception as error:  # noqa: BLE001 - a peer that does not compile is a result
            yield {
                "kernel": name,
                "shape": shape,
                "failed": f"{type(error).__name__}: {error}"[:400],
            }
            continue
        rate = 4 * HEADS * HEAD_DIM * pairs / timing.microseconds / 1e6
        yield {"kernel": name, "shape": shape, **asdict(timing), "teraflops": rate}


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    length = q.shape[2]
    mask = create_block_mask(near, None, None, length, length, device=str(q.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)
