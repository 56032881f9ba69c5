"""Routed products: which token goes through which expert, expert by expert.

Shape letters: T tokens, K chosen experts a token, D hidden width, F expert width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.weights import Weight


@dataclass(frozen=True, eq=False)
class Routes:
    """The router's choice: `ids` int64 [T, K] and `weights` float32 [T, K], each row summing to 1."""

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Expert:
    """One SwiGLU expert: w1 (gate) and w3 (up) [F, D], w2 (down) [D, F]."""

    w1: Weight
    w2: Weight
    w3: Weight


def routed(
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
        linears: a product with each of several weights.
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


def routed_token(
    x: Tensor,
    routes: Routes,
    weights: Sequence[Expert],
    act: Callable[[Tensor], Tensor],
    pairs: Callable[[Sequence[Tensor], Sequence[Weight]], list[Tensor]],
) -> Tensor:
    """`routed` of one token, to the same bits: (1, D) -> (1, D); all its experts at once.

    Args:
        pairs: the product of each x with its weight.
    """
    ids, order = routes.ids[0].sort()
    shares = routes.weights[0, order]
    chosen = [weights[index] for index in ids.tolist()]
    count = len(chosen)
    both = pairs([x] * (2 * count), [e.w1 for e in chosen] + [e.w3 for e in chosen])
    hidden = [act(gate) * up for gate, up in zip(both[:count], both[count:], strict=True)]
    ys = torch.cat(pairs(hidden, [e.w2 for e in chosen])).float() * shares[:, None]
    out = ys[:1]
    for index in range(1, count):
        out = out + ys[index]
    return out.to(x.dtype)
