"""How a whole checkpoint is quantized on calibration text."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.planning.quantize_cost import ACTIVATION_BYTES
from qmix.quantize.rounding import gptq

Weighting = Literal["none", "score", "square"]
Objective = Literal["layer", "loss"]


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How a layer is rounded.

    Attributes:
        weighting: what a token counts in an expert's H: 1, its routing weight, or that squared.
        correct: fit each matrix to the unrounded model's outputs, and not to its own outputs before
            rounding.
        objective: what rounding a matrix should change least: the outputs of the matrix, or the
            model's predictions, by gradients of one backward pass (`loss_gradients`).
        rounding: how each matrix is rounded.
    """

    weighting: Weighting = "score"
    correct: bool = True
    objective: Objective = "loss"
    rounding: gptq.RoundingOptions = field(default_factory=gptq.RoundingOptions)


@dataclass(frozen=True, kw_only=True)
class CalibratedOptions:
    """How a checkpoint is quantized.

    Attributes:
        layer: how each layer is rounded.
        device: where layers are computed.
        dtype: of their forward passes; None: bfloat16 on a GPU, float32 on the CPU.
        activation_bytes: if the tokens need more (two float32 arrays of T x D, five with
            correction), they are kept in files.
        shard_bytes: upper limit of an output file; each layer is one.
        requantize: take a quantized source too, and round what it decodes to.
    """

    layer: LayerOptions = field(default_factory=LayerOptions)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    activation_bytes: int = ACTIVATION_BYTES
    shard_bytes: int = SHARD_BYTES
    requantize: bool = False

    @property
    def forward_dtype(self) -> torch.dtype:
        """The dtype of forward passes."""
        return self.dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
