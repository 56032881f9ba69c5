"""Our kernels alone beside torch's SDPA and FlexAttention, with Mixtral's heads.

Knows nothing of a model.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.evals.steps.graph_timing import timed
from qmix.evals.steps.setting import Setting
from qmix.kernels.gpu import attention

DECODE = ((1, 512), (1, 4096), (1, 32768), (8, 4096), (16, 4096))
PREFILL = ((512, None), (4096, None), (16384, None), (16384, 4096))  # (queries, window)
_CACHED_BYTES = 100 << 20  # twice the second-level cache of an H100


@dataclass(frozen=True)
class _Heads:
    """The setting's heads: queries, keys, and the width of each."""

    queries: int
    keys: int
    width: int

    @classmethod
    def of(cls, setting: Setting) -> "_Heads":
        config = setting.widths.config
        return cls(config.num_attention_heads, config.num_key_value_heads, config.head_dim)


def results(setting: Setting) -> Iterator[dict[str, object]]:
    """One result for each kernel and shape."""
    setting.release()
    most = setting.widths.most_tokens
    for batch, keys in sorted({(min(batch, most), min(keys, most)) for batch, keys in DECODE}):
        yield from _decode(setting, batch, keys)
    for queries, window in PREFILL:
        if min(queries, most) == queries or window is None:
            yield from _prefill(setting, min(queries, most), window)


def _random(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(*shape, device=setting.device).to(setting.widths.dtype)


def _decode(setting: Setting, batch: int, keys: int) -> Iterator[dict[str, object]]:
    heads = _Heads.of(setting)
    size = 2 * batch * heads.keys * keys * heads.width * setting.widths.dtype.itemsize
    copies = max(2, -(-_CACHED_BYTES // size)) if setting.widths.turns > 1 else 2
    q = _random(setting, batch, 1, heads.queries, heads.width)
    caches = [
        tuple(_random(setting, batch, heads.keys, keys, heads.width) for _ in range(2))
        for _ in range(copies)
    ]
    past = torch.full((batch,), keys - 1, dtype=torch.int32, device=setting.device)
    grouped = q.view(batch, heads.keys, heads.queries // heads.keys, heads.width)

    def ours(k: Tensor, v: Tensor) -> Callable[[], object]:
        return lambda: attention.attend_cached(q, k, v, past)

    def theirs(k: Tensor, v: Tensor) -> Callable[[], object]:
        return lambda: F.scaled_dot_product_attention(grouped, k, v)

    for name, kernel in (("qmix", ours), ("torch SDPA, heads folded", theirs)):
        timing = timed([kernel(k, v) for k, v in caches], setting.clock)
        yield {
            "kernel": name,
            "shape": f"decode, batch {batch}, {keys} keys",
            **asdict(timing),
            "gigabytes_per_second": size / timing.microseconds / 1e3,
        }


def _prefill(setting: Setting, queries: int, window: int | None) -> Iterator[dict[str, object]]:
    heads = _Heads.of(setting)
    q = _random(setting, 1, heads.queries, queries, heads.width)
    k, v = (_random(setting, 1, heads.keys, queries, heads.width) for _ in range(2))
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
            timing = timed([call], setting.clock)
        except Exception as error:  # noqa: BLE001 - a peer that does not compile is a result
            reason = f"{type(error).__name__}: {error}"[:400]
            yield {"kernel": name, "shape": shape, "failed": reason}
            continue
        rate = 4 * heads.queries * heads.width * pairs / timing.microseconds / 1e6
        yield {"kernel": name, "shape": shape, **asdict(timing), "teraflops": rate}


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    length = q.shape[2]
    mask = create_block_mask(near, None, None, length, length, device=str(q.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)
