"""The sparse block: a router, and the experts that it chooses."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.experts.layer_experts import Experts, ResidentExperts
from qmix.experts.store import Store, StoredExperts
from qmix.kernels import Routes
from qmix.nn.linear import Linear
from qmix.weights.dense import Dense, Weight
from qmix.weights.expert import Expert

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class SwiGLU(nn.Module):
    """One expert: w1 (gate), w2 (down), w3 (up). Multiplied by Experts.forward, never called."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.intermediate_size)
        self.w2 = Linear(config.intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.intermediate_size)

    @property
    def stored(self) -> Expert:
        return Expert(w1=self.w1.stored, w2=self.w2.stored, w3=self.w3.stored)


class SparseMoeBlock(nn.Module):
    """Router and experts: each token goes through k of E (arXiv 2401.04088, section 2.1)."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self._config = config
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate = Linear(config.hidden_size, config.num_local_experts)
        self.experts = nn.ModuleList(SwiGLU(config) for _ in range(config.num_local_experts))
        self._placed: Experts | None = None  # None: the weights are the modules' own

    @property
    def num_experts_per_tok(self) -> int:
        """Experts that a token goes through."""
        return self._config.num_experts_per_tok

    @property
    def jitter_noise(self) -> float:
        """By how much training scales the router's inputs at most."""
        return self._config.router_jitter_noise

    @property
    def stored(self) -> Experts:
        """The experts: those that were stored as a whole, or else the modules' own weights."""
        if self._placed is not None:
            return self._placed
        return ResidentExperts(
            len(self.experts), lambda index: cast(SwiGLU, self.experts[index]).stored
        )

    @property
    def offloaded(self) -> Store | None:
        """The store that keeps the experts, if one does."""
        return self._placed.store if isinstance(self._placed, StoredExperts) else None

    def store(self, experts: Experts) -> None:
        """Replace the experts as a whole; the modules then describe them."""
        for module, expert in zip(self.experts, experts, strict=True):
            assert isinstance(module, SwiGLU)
            module.w1.store(expert.w1)
            module.w2.store(expert.w2)
            module.w3.store(expert.w3)
        self._placed = experts

    def quantized_weights(self) -> list[Weight | None]:
        """The quantized w1, w3 and w2 of each expert, None if dense; empty unless they are the
        modules' own.
        """
        if self._placed is not None:
            return []
        return [
            getattr(modules.get(name), "_packed", None)
            for modules in (expert._modules for expert in self.experts._modules.values())
            for name in ("w1", "w3", "w2")
        ]

    def release(self) -> None:
        """Free the experts' weights, until others are stored."""
        for index in range(len(self.experts)):
            self.release_expert(index)
        self._placed = None

    def release_expert(self, index: int) -> None:
        """Free one expert's weights, if they are the modules' own, until others are stored."""
        expert = self.experts[index]
        assert isinstance(expert, SwiGLU)
        for module in (expert.w1, expert.w2, expert.w3):
            shape = (module.out_features, module.in_features)
            module.store(Dense(torch.empty(shape, device="meta")))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D) and the raw router logits (T, E)."""
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        tokens = x.reshape(-1, x.shape[-1])
        logits: Tensor = self.gate(tokens)
        routes = kernels.route(logits, self.num_experts_per_tok)
        return self.moe_forward(tokens, routes).view_as(x), logits

    def moe_forward(self, tokens: Tensor, routes: Routes) -> Tensor:
        """Each token through the experts that were chosen for it: (T, D) -> (T, D)."""
        return self.stored.forward(tokens, routes, self.act)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseMoeBlock":
        if self.offloaded is not None:
            self.gate._apply(fn, recurse)  # a store's experts stay in their memories
            return self
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._placed is not None and self._placed[0].w1 is not self._first().w1.stored:
            self._placed = None  # moved: its experts are standard weights again
        return self

    def _first(self) -> SwiGLU:
        first = self.experts[0]
        assert isinstance(first, SwiGLU)
        return first
