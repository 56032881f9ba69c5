"""LayerLaunches: the launches of a decode step between the embedding and the head.

Nine a layer, or fewer where one launch does what several did: see StepTuning. Nothing here may
depend on a value that lies on the device, so that the launches can be recorded. Shape letters: see
qmix.nn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.generation.packed_layers import LayerWeights, Projection
from qmix.kernels.gpu.grid import Tuning, most_blocks
from qmix.kernels.gpu.launch import can_depend
from qmix.kernels.gpu.step_tuning import StepTuning
from qmix.kernels.kv_rows import is_rows
from qmix.kernels.moe import DECODE_TOKENS
from qmix.weights.blob import aligned
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.tile_format import PANEL

if TYPE_CHECKING:  # needs triton
    from qmix.kernels.gpu.fused import Normed


@dataclass(frozen=True, eq=False, kw_only=True)
class StepSettings:
    """What all layers of a step share.

    Attributes:
        heads, top_k, eps, window: the config's.
        cos, sin: of all positions.
        past: int32 (B,) on the device, columns before the step's.
        padding: int32 (B,), columns of padding on the left; None: there is none.
        last_norm: the weight of the final norm.
    """

    heads: int
    top_k: int
    eps: float
    window: int | None
    cos: Tensor
    sin: Tensor
    past: Tensor
    padding: Tensor | None
    last_norm: Tensor


class LayerLaunches:
    """All layers, and the final norm: embedded ids (B, D) -> normed (B, D), and the expert ids."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        storage: Sequence[tuple[Tensor, Tensor]],
        settings: StepSettings,
        tuning: StepTuning,
    ) -> None:
        """`storage` holds each layer's keys and values, [B, G, slots, d], or rows of codes."""
        self._layers, self._storage, self._settings = layers, storage, settings
        self._tuning = tuning
        keys = storage[0][0]
        batch, shared = keys.shape[:2]
        width = settings.cos.shape[-1]
        device, hidden = settings.past.device, len(settings.last_norm)
        packed = [layer.projections for layer in layers]
        fits = width == PANEL and batch <= DECODE_TOKENS and None not in packed
        self._rotates_in_qkv = fits and tuning.rotate_in_qkv
        self._norms_in_products = self._rotates_in_qkv and tuning.norm_in_products
        # Counters, zero before and after every launch. No launch shares them with its neighbour.
        rows = [each.shape[0] for pair in packed if pair is not None for each in pair]
        panels = max([hidden, *rows]) // PANEL
        # Each begins at a multiple of 16 bytes: Triton compiles others anew.
        count = aligned(max(batch * shared, 4 * panels + 1), 4)
        zeros = torch.zeros(3, count, dtype=torch.int32, device=device)
        self._split_arrivals = zeros[0] if tuning.merge_in_split else None
        self._arrivals, self._down_arrivals = zeros[1], zeros[2]
        experts = layers[0].experts.table
        blocks = experts.addresses.shape[1] * most_blocks(experts.shape)
        self._gate_arrivals = (
            torch.zeros(blocks, dtype=torch.int32, device=device) if tuning.split_gate else None
        )
        # Attention makes codes of a step's keys and values, which wait here for it.
        self._new: tuple[Tensor, Tensor] | None = None
        if is_rows(keys):
            new = torch.empty(2, batch, shared, 1, width, dtype=settings.cos.dtype, device=device)
            self._new = new[0], new[1]
        self._no_partials = torch.zeros(batch, hidden, device=device)
        self._dependent = tuning.dependent and can_depend(device)

    def __call__(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Launch them."""
        return self._fused(x) if self._norms_in_products else self._separate(x)

    def _separate(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A norm is a launch."""
        from qmix.kernels.gpu import moe, pointwise

        shared, tuning, half = self._settings, self._tuning, torch.float16
        partials = self._no_partials
        expert_ids = []
        for index, layer in enumerate(self._layers):
            x, normed = pointwise.residual_norm(
                x, partials, layer.input_norm, shared.eps, dtype=half
            )
            attended = self._attended(self._queries(normed, index), index)
            router = pointwise.residual_norm_route(
                x,
                _partials(attended, layer.o_proj, tuning.o_proj),
                layer.post_norm,
                shared.eps,
                layer.gate,
                shared.top_k,
                dtype=half,
            )
            x = router.total
            expert_ids.append(router.routes.ids)
            partials = moe.expert_partials(
                router.normed,
                router.routes,
                layer.experts.table,
                0,
                tuning.gate_up,
                tuning.down,
                arrivals=self._gate_arrivals,
                dependent=self._dependent,
            )
        return pointwise.residual_norm(x, partials, shared.last_norm, shared.eps)[1], expert_ids

    def _fused(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Products add what they computed to the residual, and leave a norm to the next product."""
        from qmix.kernels.gpu import fused, pointwise

        shared, tuning = self._settings, self._tuning
        early = fused.Early(self._dependent, tuning.prefetch)
        norms = [*(layer.input_norm for layer in self._layers[1:]), shared.last_norm]
        normed = fused.start_norm(x, self._layers[0].input_norm, shared.eps)
        expert_ids = []
        for index, layer in enumerate(self._layers):
            assert isinstance(layer.o_proj, PackedMatrix)
            normed, routes = fused.project_route(
                self._attended(self._queries(normed, index), index),
                layer.o_proj,
                normed,
                layer.post_norm,
                shared.eps,
                layer.gate,
                shared.top_k,
                self._arrivals,
                tuning.o_proj,
                early,
            )
            expert_ids.append(routes.ids)
            normed = fused.add_experts(
                normed,
                routes,
                layer.experts.table,
                norms[index],
                shared.eps,
                self._down_arrivals,
                tuning.gate_up,
                tuning.down,
                self._gate_arrivals,
                early,
            )
        return pointwise.rms_norm(normed.total, shared.last_norm, shared.eps), expert_ids

    def _queries(self, x: "Tensor | Normed", index: int) -> Tensor:
        """Rotated queries [B, 1, H, d] of normed rows; their keys and values go into the cache."""
        from qmix.kernels.gpu import fused, pointwise

        shared, weight = self._settings, self._layers[index].qkv
        keys, values = self._new or self._storage[index]
        places = (keys, values, shared.cos, shared.sin, shared.past)
        if self._rotates_in_qkv:
            assert isinstance(weight, PackedMatrix)
            return fused.rotated_qkv(
                x,
                weight,
                *places,
                self._arrivals,
                heads=shared.heads,
                starts=shared.padding,
                dtype=keys.dtype,
                tuning=self._tuning.qkv,
                early=fused.Early(self._dependent, self._tuning.prefetch),
            )
        assert isinstance(x, Tensor)
        return pointwise.rotate_store(
            _partials(x, weight, self._tuning.qkv),
            *places,
            heads=shared.heads,
            starts=shared.padding,
            dtype=keys.dtype,
        )

    def _attended(self, q: Tensor, index: int) -> Tensor:
        """Attention over the cache: float16 (B, H d)."""
        from qmix.kernels.gpu import attention

        shared = self._settings
        attended = attention.attend_cached(
            q,
            *self._storage[index],
            shared.past,
            starts=shared.padding,
            window=shared.window,
            dtype=torch.float16,
            arrivals=self._split_arrivals,
            dependent=self._dependent,
            tuning=self._tuning.attention,
            new=self._new,
        )
        return attended.view(len(q), -1)


def _partials(x: Tensor, weight: Projection, tuning: Tuning) -> Tensor:
    """The partial sums of a projection of float16 rows [B, K]: float32 [Z, B, N]."""
    from qmix.kernels.gpu import moe

    if isinstance(weight, PackedMatrix):
        return moe.linear_partials(x, weight, tuning)
    outputs = [
        moe.linear_partials(x, part, tuning).sum(0)
        if isinstance(part, PackedMatrix)
        else F.linear(x.to(part.dtype), part).float()
        for part in weight
    ]
    return torch.cat(outputs, 1)[None]
