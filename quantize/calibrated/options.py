"""How a whole checkpoint is quantized on calibration text."""

from dataclasses import dataclass, field

import torch

from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.planning.quantize_cost import ACTIVATION_BYTES
from qmix.quantize.calibrated.layer import LayerOptions


@dataclass(frozen=True, kw_only=True)
class CalibratedOptions:
    """How a checkpoint is quantized.

    Attributes:
        layer: how each layer is rounded.
        device: where layers are computed.
        activation_bytes: if the tokens need more (two float32 arrays of T x D, five with
            correction), they are kept in files.
        shard_bytes: upper limit of an output file; each layer is one.
    """

    layer: LayerOptions = field(default_factory=LayerOptions)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    activation_bytes: int = ACTIVATION_BYTES
    shard_bytes: int = SHARD_BYTES
