"""Requests that decode together, in the slots of a server: their speed, and each beside it alone.

A row that read another's keys or ids would have other logits altogether; roundings differ, because
as many rows as there are take other thread blocks. Knows nothing of requests and of HTTP.
"""

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qmix.evals.steps.setting import Setting
from qmix.evals.timing import bandwidth
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.nn.cache_rows import CacheRows

_COUNTS = (1, 4, 8, 16)
_PROMPT, _STEPS = 64, 32
# Of the norm of a row's logits: another row's differ by 1 and more, roundings by a few hundredths.
_BOUND = 0.3


def results(setting: Setting, weights: str) -> Iterator[dict[str, object]]:
    """One result for each number of requests, whose prompts have different lengths.

    Args:
        weights: of the model, `nf4` or `int4`.
    """
    model, most = setting.model(weights), setting.widths.most_tokens
    steps = min(_STEPS, most)
    lengths = [min(_PROMPT, most) + 7 * row for row in range(min(max(_COUNTS), most))]
    slots = model.new_rows(len(lengths), max(lengths) + 2 * steps)
    generator = torch.Generator().manual_seed(0)
    for slot, length in zip(slots, lengths, strict=True):
        ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
        model.next_logits(ids.to(model.device), slot)
    for count in _COUNTS[: 1 + sum(each <= most for each in _COUNTS[1:])]:
        yield _together(model, slots[:count], lengths, steps)


def _together(
    model: MixtralForCausalLM, slots: Sequence[KVCache], lengths: Sequence[int], steps: int
) -> dict[str, object]:
    """Greedy steps of these slots, in an order other than that of their places."""
    order = list(reversed(range(len(slots))))
    rows = CacheRows([slots[index] for index in order])
    ids = torch.arange(len(slots), device=model.device)[:, None] + 3

    def step(newest: Tensor) -> Tensor:
        return model.next_logits(newest, rows, None, rows.position_ids())

    found, use = model.next_logits_with_experts(ids, rows, rows.position_ids())
    begun, newest = time.perf_counter(), found
    for _ in range(steps):
        newest = step(newest.argmax(-1, keepdim=True))
    bandwidth.synchronize(model.device)
    seconds = time.perf_counter() - begun
    for slot, length in zip(slots, lengths, strict=False):
        slot.rewind(length)
    alone = torch.cat([model.next_logits(ids[n : n + 1], slots[i]) for n, i in enumerate(order)])
    for slot, length in zip(slots, lengths, strict=False):
        slot.rewind(length)
    error = float(((found - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
    result: dict[str, object] = {
        "requests": len(slots),
        "tokens_per_second": len(slots) * steps / seconds,
        "milliseconds_a_step": 1e3 * seconds / steps,
        "largest_error": error,
        "same_choice": float((found.argmax(-1) == alone.argmax(-1)).float().mean()),
    }
    if not error < _BOUND:
        result["failed"] = f"a row's logits differ by {error:.0%} from those of the row alone"
    chosen = model.config.num_experts_per_tok
    if not bool((use.sum(-1) == chosen).all()):
        result["failed"] = f"counted other than {chosen} experts a token and layer"
    return result
