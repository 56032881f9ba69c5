"""Models of any size with random weights in the packed layout, made on the device, for timing.

46.7 B weights take seconds, because nothing is read, quantized or packed. Activations keep their
size through any depth, so routing is nearly uniform; real prompts route less evenly. Knows nothing
of time.

Shape letters: N outputs, K inputs, D hidden width, F expert width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.experts.layer_experts import GpuExperts
from qmix.kernels import PackedExperts, PackedWeight
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.decoder_layer import DecoderLayer
from qmix.nn.linear import Linear
from qmix.weights.packed import codes
from qmix.weights.packed.layout import PackedExpert, PackedMatrix
from qmix.weights.packed.tile_format import HEADER_BYTES, PANEL, TileFormat, TileKind
from qmix.weights.table import NF4_VALUES

NF4 = TileFormat("nf4", 64)
INT4 = TileFormat("int4", 128)
INT3 = TileFormat("int3", 128)
FORMATS = {"nf4": NF4, "int4": INT4, "int3": INT3}


def _rms(kind: TileKind) -> float:
    """Root mean square of the values of equally likely codes."""
    values: Sequence[float] = NF4_VALUES
    if kind != "nf4":
        values = [code - codes.HALF_RANGE[kind] for code in range(2 * codes.HALF_RANGE[kind])]
    return math.sqrt(sum(value * value for value in values) / len(values))


def build_random_model(
    config: MixtralConfig,
    tile_format: TileFormat,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> MixtralForCausalLM:
    """A whole model, made of the same layers that a checkpoint would fill.

    Raises:
        UnsupportedError: the kernels do not take this number of experts.
    """
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    weights = RandomWeights(tile_format, device, dtype, seed)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, block = layer.self_attn, layer.block_sparse_moe
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        rows = [module.out_features for module in projections]
        whole = weights.matrix((sum(rows), config.hidden_size))
        starts = [sum(rows[:index]) for index in range(len(rows))]
        parts = [
            PackedWeight(whole, range(start, start + count), None)
            for start, count in zip(starts, rows, strict=True)
        ]
        attention.store_fused_qkv(PackedWeight(whole, None, None), parts)
        attention.o_proj.store(PackedWeight(weights.matrix(_shape(attention.o_proj)), None, None))
        shape = (config.intermediate_size, config.hidden_size)
        experts = [weights.expert(shape) for _ in range(config.num_local_experts)]
        block.store(GpuExperts(PackedExperts(experts)))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.is_meta:
            module.weight = nn.Parameter(weights.dense(tuple(weight.shape), name))
    return model.eval()


class RandomWeights:
    """Random weights of one tile format, on one device, from one seed."""

    def __init__(
        self, tile_format: TileFormat, device: torch.device, dtype: torch.dtype, seed: int
    ) -> None:
        self._tile_format, self._device, self._dtype = tile_format, device, dtype
        self._generator: torch.Generator | None = None
        if device.type != "meta":
            self._generator = torch.Generator(device).manual_seed(seed)

    def dense(self, shape: tuple[int, ...], name: str) -> Tensor:
        """Ones for a norm, else normal numbers that preserve the size of activations."""
        if name.endswith("norm"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        data = torch.empty(shape, dtype=self._dtype, device=self._device)
        deviation = 1.0 if name.endswith("embed_tokens") else shape[-1] ** -0.5
        return data.normal_(0, deviation, generator=self._generator)

    def matrix(self, shape: tuple[int, int]) -> PackedMatrix:
        """A packed matrix [N, K] that preserves the size of activations."""
        blob = torch.empty(
            self._tile_format.matrix_bytes(shape), dtype=torch.uint8, device=self._device
        )
        return self._filled(blob, shape)

    def expert(self, shape: tuple[int, int]) -> PackedExpert:
        """An expert with w1 and w3 [F, D] and w2 [D, F], in one blob."""
        width, hidden = shape
        first, second = (2 * width, hidden), (hidden, width)
        size, other = self._tile_format.matrix_bytes(first), self._tile_format.matrix_bytes(second)
        blob = torch.empty(size + other, dtype=torch.uint8, device=self._device)
        return PackedExpert(
            blob, self._filled(blob[:size], first), self._filled(blob[size:], second)
        )

    def _filled(self, blob: Tensor, shape: tuple[int, int]) -> PackedMatrix:
        tile_format = self._tile_format
        blob.random_(0, 256, generator=self._generator)
        table = codes.TABLES["nf4"]
        stretch = table.stretch if tile_format.kind == "nf4" else 1.0
        header = torch.tensor([1 / stretch, 1 / stretch, 1.0, 1.0]).view(torch.uint8)
        words = torch.tensor(table.words).to(torch.int32).view(torch.uint8)
        blob[: len(header)] = header.to(self._device)
        blob[len(header) : len(header) + len(words)] = words.to(self._device)
        panels, tiles = shape[0] // PANEL, shape[1] // tile_format.inputs
        tile = blob[HEADER_BYTES:].view(panels, tiles, tile_format.tile_bytes)
        scales = tile[
            :, :, tile_format.code_bytes : tile_format.code_bytes + tile_format.scale_bytes
        ].view(torch.float16)
        size = 1 / (_rms(tile_format.kind) * math.sqrt(shape[1]))
        scales.uniform_(0.8 * size, 1.2 * size, generator=self._generator)
        assert tile_format.symmetric
        return PackedMatrix(blob, tile_format, shape, tile_format.group_inputs, self._dtype)


def _shape(module: Linear) -> tuple[int, int]:
    return module.out_features, module.in_features
