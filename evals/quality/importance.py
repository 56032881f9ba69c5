"""The mean square of each input of each matrix on calibration windows: llama.cpp's "imatrix".

Names and shapes are those of GGUF files: the experts of a layer are one tensor, one after another.
Knows nothing of llama.cpp.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qmix import kernels
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.decoder_layer import DecoderLayer
from qmix.nn.moe import SparseMoeBlock, SwiGLU


class _MeanSquares:
    """Running means of squares by tensor, [rows, K] each; a matrix of its own is one row."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, inputs: Tensor, row: int = 0, rows: int = 1) -> None:
        """Add inputs [..., K] of one row of a tensor."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        sums = self._sums.setdefault(name, torch.zeros(rows, flat.shape[1]))
        counts = self._counts.setdefault(name, torch.zeros(rows, 1))
        sums[row] += flat.square().sum(0)
        counts[row] += len(flat)

    def means(self) -> Mapping[str, Tensor]:
        """float32 [rows * K] by tensor; all inputs count alike in a row that had no token."""
        return {
            name: torch.where(self._counts[name] > 0, sums / self._counts[name], 1.0).flatten()
            for name, sums in self._sums.items()
        }


@torch.no_grad()
def importance(directory: Path, windows: Tensor) -> Mapping[str, Tensor]:
    """The importance of every matrix's inputs, float32, by its name in a GGUF file.

    Args:
        directory: a checkpoint in 16 bits.
        windows: int64 (W, S).

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    model = MixtralForCausalLM.from_pretrained(directory, dtype="float32", device="cpu")
    found = _MeanSquares()
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        base, attention, moe = f"blk.{index}", layer.self_attn, layer.block_sparse_moe
        for part, projection in (
            ("q", attention.q_proj),
            ("k", attention.k_proj),
            ("v", attention.v_proj),
            ("output", attention.o_proj),
        ):
            _watch(projection, partial(found.add, f"{base}.attn_{part}.weight"))
        _watch(moe, partial(_add_experts, found, base, moe))
    for window in windows:
        model(window[None])
    return found.means()


def _watch(module: torch.nn.Module, see: "partial[None]") -> None:
    module.register_forward_pre_hook(lambda _, inputs: see(inputs[0]))


def _add_experts(found: _MeanSquares, base: str, moe: SparseMoeBlock, x: Tensor) -> None:
    tokens = x.reshape(-1, x.shape[-1])
    routes = kernels.route(moe.gate(tokens), moe.num_experts_per_tok)
    for index, expert in enumerate(moe.experts):
        assert isinstance(expert, SwiGLU)
        inputs = tokens[(routes.ids == index).any(-1)]
        inner = moe.act(kernels.linear(inputs, expert.w1.stored))
        inner = inner * kernels.linear(inputs, expert.w3.stored)
        for part, values in (("gate", inputs), ("up", inputs), ("down", inner)):
            found.add(f"{base}.ffn_{part}_exps.weight", values, index, len(moe.experts))
