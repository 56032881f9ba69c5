"""The MoE forward pass, expert by expert: which token goes through which expert.

Knows no bits: the matmuls are handed in. Shape letters: see qmix.kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.weights.dense import Weight
from qmix.weights.expert import Expert

# A forward pass of more tokens than this is a prompt: a store then streams each layer once and
# leaves heat as it is. A GPU's kernels take up to as many tokens without sorting them by expert.
DECODE_TOKENS = 16


@dataclass(frozen=True, eq=False)
class Routes:
    """The router's choice: `ids` int64 [T, k], `weights` float32 [T, k], each row summing to 1."""

    ids: Tensor
    weights: Tensor


def moe_forward(
    x: Tensor,
    routes: Routes,
    weights: Sequence[Expert],
    act: Callable[[Tensor], Tensor],
    linears: Callable[[Tensor, Sequence[Weight]], list[Tensor]],
) -> Tensor:
    """`sum_k weight_k * w2(act(w1 x) * w3 x)`: (T, D) -> (T, D).

    Only experts that some token chose are asked for and multiplied, one after another. The sum is
    float32 in ascending expert order, so two runs give equal bits.

    Args:
        linears: a matmul with each of several weights.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for index in torch.unique(routes.ids).tolist():
        expert = weights[index]
        token, slot = torch.where(routes.ids == index)
        chosen = x[token]
        gate, up = linears(chosen, (expert.w1, expert.w3))
        y = linears(act(gate) * up, (expert.w2,))[0].float() * routes.weights[token, slot, None]
        out = out.index_add(0, token, y) if y.requires_grad else out.index_add_(0, token, y)
    return out.to(x.dtype)


@dataclass(frozen=True, eq=False)
class ExpertTokens:
    """Which tokens of a batch go through each of several experts, sorted by expert.

    Attributes:
        counts: how many go through each expert.
        tokens: int64, those of the first expert, then those of the second.
        routing_weights: float32, likewise.
    """

    counts: Sequence[int]
    tokens: Tensor
    routing_weights: Tensor

    def each(self) -> Iterator["ExpertTokens"]:
        """The tokens of one expert after another."""
        both = self.tokens, self.routing_weights
        parts = (part.split_with_sizes(list(self.counts)) for part in both)
        for count, tokens, weights in zip(self.counts, *parts, strict=True):
            yield ExpertTokens((count,), tokens, weights)


def moe_forward_sorted(
    x: Tensor,
    routes: Routes,
    weights: Sequence[Expert],
    add_experts: Callable[[Tensor, Sequence[Expert], ExpertTokens, Tensor], None],
    *,
    resident: bool,
) -> Tensor:
    """`moe_forward` with the tokens sorted by expert beforehand: (T, D) -> (T, D).

    Args:
        add_experts: adds the experts' outputs for their tokens of x, times the routing weights, to
            a float32 sum [T, D].
        resident: hand it all experts at once; otherwise one after the other, in ascending order.
    """
    ids = routes.ids.flatten()
    chosen, counts = torch.unique(ids, return_counts=True)
    order = ids.argsort(stable=True)
    shares = routes.weights.float().flatten()[order]
    through = ExpertTokens(counts.tolist(), order // routes.ids.shape[1], shares)
    out = torch.zeros(x.shape, dtype=torch.float32)
    if resident:
        add_experts(x, [weights[index] for index in chosen.tolist()], through, out)
    else:
        for index, own in zip(chosen.tolist(), through.each(), strict=True):
            add_experts(x, [weights[index]], own, out)
    return out.to(x.dtype)
