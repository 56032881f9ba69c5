"""What of a calibrated run fits a memory. Knows nothing of how a layer is rounded."""

import torch

from qmix.config import MixtralConfig
from qmix.planning import quantize_cost
from qmix.quantize.calibrated.options import LayerOptions

# On the CPU. Small matrices are rounded two to six times as fast together as one after the other;
# from a width of 1024 on there is nothing to gain.
_HOST_BYTES = 1 << 30


def experts_at_once(config: MixtralConfig, options: LayerOptions, device: torch.device) -> int:
    """How many experts are rounded together: as many as fit, and one at least."""
    free = 0.8 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _HOST_BYTES
    return max(1, min(config.num_local_experts, int(free / expert_bytes(config, options))))


def expert_bytes(config: MixtralConfig, options: LayerOptions) -> int:
    """The most that all arrays of an expert take while its matrices are rounded."""
    by_loss = options.objective == "loss"
    return quantize_cost.expert_bytes(config, correct=options.correct, by_loss=by_loss)


def fitting_device(device: torch.device, token_bytes: int) -> torch.device:
    """Where the arrays of tokens lie: on a GPU if they take 60 % of its free memory at most.

    The rest is for the layer: moments, factors and one expert or more.
    """
    if device.type == "cuda" and token_bytes <= 0.6 * torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")
