"""Random 4-bit weights in the formats of files, and decoder layers made of them, on the CPU.

The weights of evals.timing.random_model are in the packed layout of a GPU; these are not. Shape
letters: N outputs, K inputs. Knows nothing of time.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.nn.decoder_layer import DecoderLayer
from qmix.nn.linear import Linear
from qmix.weights.affine import Affine
from qmix.weights.dense import Weight
from qmix.weights.scales import NestedScales, Scales
from qmix.weights.table import IQ4_VALUES, NF4_VALUES, Table

# The last three are what GGUF files call Q4_0, Q4_K and IQ4_XS.
FORMATS = ("nf4", "nf4 nested", "int4 g128", "int4 g32", "q4_k", "iq4_xs")


def random_weight(weight_format: str, shape: tuple[int, int], seed: int) -> Weight:
    """A weight [N, K] of random codes, with values of about K ** -0.5.

    Args:
        weight_format: one of FORMATS.
    """
    rows, inputs = shape
    generator = torch.Generator().manual_seed(seed)

    def random_bytes(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    if weight_format in ("q4_k", "iq4_xs"):
        superblocks = torch.full((rows * inputs // 256,), inputs**-0.5 / 400).half()
        codes = random_bytes(rows, inputs // 2)
        six_bits = random_bytes(rows, inputs // 32 * 3 // 4)
        signs = torch.arange(64.0)
        if weight_format == "iq4_xs":
            nested = NestedScales(six_bits, superblocks / 3, signs - 32, block=8, bits=6)
            table = torch.tensor(IQ4_VALUES)
            return Table(
                codes.flatten(), nested, table, shape, torch.bfloat16, 32, "iq4", high_first=False
            )
        nested = NestedScales(six_bits, superblocks, signs, block=8, bits=6)
        return Affine(codes, nested, biases=replace(nested, map=-8 * signs))
    if weight_format.startswith("int4"):
        group = min(int(weight_format.removeprefix("int4 g")), inputs)
        group_scales = torch.rand(rows, inputs // group, generator=generator).add_(0.5)
        group_scales.mul_(inputs**-0.5 / 5)
        return Affine(random_bytes(rows, inputs // 2), group_scales.half())
    blocks = rows * inputs // 64
    scales: Scales
    if weight_format == "nf4 nested":
        outer = torch.full((-(-blocks // 256),), inputs**-0.5)
        dynamic_map = torch.linspace(-1, 1, 256)
        scales = NestedScales(random_bytes(blocks), outer, dynamic_map, 2 * inputs**-0.5)
    else:
        scales = torch.rand(blocks, generator=generator).add_(1).mul_(inputs**-0.5)
    codes = random_bytes(rows * inputs // 2)
    return Table(codes, scales, torch.tensor(NF4_VALUES), shape, torch.bfloat16)


def random_layer(config: MixtralConfig, weight_format: str) -> DecoderLayer:
    """A layer whose attention and experts are random weights of one format."""
    with torch.device("meta"):
        layer = DecoderLayer(config, 0)
    for seed, (name, module) in enumerate(layer.named_modules()):
        if isinstance(module, Linear) and name.endswith("gate"):
            gate = torch.randn(module.out_features, module.in_features).bfloat16()
            module.weight = nn.Parameter(gate / module.in_features**0.5)
        elif isinstance(module, Linear):
            shape = (module.out_features, module.in_features)
            module.store(random_weight(weight_format, shape, seed))
        elif name.endswith("norm"):
            module.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=torch.bfloat16))
    return layer.eval()
