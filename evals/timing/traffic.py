"""The bytes that one decode step really reads: its distinct experts, the rest of the model, the cache.

Shape letters: B rows, T tokens, E experts. Knows weights by `nbytes` only; counts nothing of activations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.nn.linear import Linear
from qmix.nn.moe import SparseMoeBlock, SwiGLU


@dataclass(frozen=True)
class Traffic:
    """What one step reads.

    Attributes:
        weights: bytes of packed and dense weights, each distinct expert once.
        cache: bytes of keys and values.
        distinct: experts a layer that any row chose, the mean over layers.
    """

    weights: int
    cache: int
    distinct: float

    @property
    def total(self) -> int:
        return self.weights + self.cache


def of_step(model: MixtralForCausalLM, ids: Tensor, cache: KVCache) -> Traffic:
    """Run one step (B, 1) after what the cache holds, and count; the cache then holds it too."""
    with torch.no_grad(), _watched(model) as chosen:
        model.model.decode(model.model.embed(ids), cache=cache)
    count = model.config.num_experts_per_tok
    experts, distinct = 0, 0
    for block, logits in chosen:
        taken = set(logits.topk(count, -1).indices.flatten().tolist())
        distinct += len(taken)
        experts += sum(_expert_bytes(block, index) for index in taken)
    held = cache.stored_length / cache.capacity
    return Traffic(
        weights=experts + shared_bytes(model, ids.shape[0]),
        cache=round(cache.nbytes * held),
        distinct=distinct / len(chosen),
    )


@contextmanager
def _watched(
    model: MixtralForCausalLM,
) -> Iterator[list[tuple[SparseMoeBlock, Tensor]]]:
    """Within the block the router logits (T, E) of every layer are kept."""
    seen: list[tuple[SparseMoeBlock, Tensor]] = []
    hooks = []
    for block in model.modules():
        if isinstance(block, SparseMoeBlock):

            def keep(
                _: nn.Module, __: object, logits: Tensor, block: SparseMoeBlock = block
            ) -> None:
                seen.append((block, logits.detach()))

            hooks.append(block.gate.register_forward_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _expert_bytes(block: SparseMoeBlock, index: int) -> int:
    expert = block.experts[index]
    assert isinstance(expert, SwiGLU)
    return sum(part.stored.nbytes for part in (expert.w1, expert.w2, expert.w3))


def shared_bytes(model: nn.Module, rows: int) -> int:
    """Everything but the experts; of the embedding a row for each id."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            total += 0 if ".experts." in name else module.stored.nbytes
        elif isinstance(module, nn.Embedding):
            total += rows * module.weight[0].nbytes
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            assert isinstance(module.weight, Tensor)
            total += module.weight.nbytes
    return total


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are stored."""
    experts = sum(
        module.stored.nbytes
        for name, module in model.named_modules()
        if isinstance(module, Linear) and ".experts." in name
    )
    embedding = next(m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    assert isinstance(embedding, torch.Tensor)
    return experts + shared_bytes(model, len(embedding))


def weight_count(model: nn.Module) -> int:
    """Weights of the model, however many bits they take."""
    total = 0
    for module in model.modules():
        if isinstance(module, Linear):
            total += module.stored.shape[0] * module.stored.shape[1]
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            assert isinstance(module.weight, Tensor)
            total += module.weight.numel()
    return total
