"""The bytes that one decode step reads: its distinct experts, the rest of the model, the cache.

Activations are not counted. Shape letters: B rows, T tokens, E experts. Knows weights by `nbytes`
only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.nn.embedding import Embedding
from qmix.nn.linear import Linear
from qmix.nn.moe import SparseMoeBlock, SwiGLU
from qmix.nn.stored import StoredModule


@dataclass(frozen=True)
class StepTraffic:
    """What one step reads.

    Attributes:
        weights: bytes of packed and dense weights, each distinct expert once.
        cache: bytes of keys and values.
        distinct_experts: experts of a layer that any row chose; the mean over layers.
    """

    weights: int
    cache: int
    distinct_experts: float

    @property
    def total(self) -> int:
        """Bytes of weights and cache together."""
        return self.weights + self.cache


def step_traffic(model: MixtralForCausalLM, ids: Tensor, cache: KVCache) -> StepTraffic:
    """Run one step of ids (B, 1), which is added to the cache, and count what it reads."""
    with torch.no_grad(), _recorded_logits(model) as router_logits:
        model.model.decode(model.model.embed(ids), cache=cache)
    count = model.config.num_experts_per_tok
    experts, distinct = 0, 0
    for block, logits in router_logits:
        chosen = set(logits.topk(count, -1).indices.flatten().tolist())
        distinct += len(chosen)
        experts += sum(_expert_bytes(block, index) for index in chosen)
    filled = cache.stored_length / cache.capacity
    return StepTraffic(
        weights=experts + shared_bytes(model, ids.shape[0]),
        cache=round(cache.nbytes * filled),
        distinct_experts=distinct / len(router_logits),
    )


@contextmanager
def _recorded_logits(
    model: MixtralForCausalLM,
) -> Iterator[list[tuple[SparseMoeBlock, Tensor]]]:
    """A list that collects every layer and its router logits (T, E) inside the `with` block."""
    recorded: list[tuple[SparseMoeBlock, Tensor]] = []
    hooks = []
    for block in model.modules():
        if isinstance(block, SparseMoeBlock):

            def record(
                _: nn.Module, __: object, logits: Tensor, block: SparseMoeBlock = block
            ) -> None:
                recorded.append((block, logits.detach()))

            hooks.append(block.gate.register_forward_hook(record))
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _expert_bytes(block: SparseMoeBlock, index: int) -> int:
    expert = block.experts[index]
    assert isinstance(expert, SwiGLU)
    return sum(part.stored.nbytes for part in (expert.w1, expert.w2, expert.w3))


def shared_bytes(model: nn.Module, rows: int) -> int:
    """Bytes of everything but the experts; of the embedding only `rows` rows, one for each id."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            total += 0 if ".experts." in name else module.stored.nbytes
        elif isinstance(module, Embedding):
            total += rows * (module.stored.nbytes // module.num_embeddings)
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            assert isinstance(module.weight, Tensor)
            total += module.weight.nbytes
    return total


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights as stored."""
    experts = sum(
        module.stored.nbytes
        for name, module in model.named_modules()
        if isinstance(module, Linear) and ".experts." in name
    )
    embedding = next(m for m in model.modules() if isinstance(m, Embedding))
    return experts + shared_bytes(model, embedding.num_embeddings)


def weight_count(model: nn.Module) -> int:
    """Number of weights of the model, however many bits they have."""
    total = 0
    for module in model.modules():
        if isinstance(module, StoredModule):
            total += module.stored.shape[0] * module.stored.shape[1]
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            assert isinstance(module.weight, Tensor)
            total += module.weight.numel()
    return total
