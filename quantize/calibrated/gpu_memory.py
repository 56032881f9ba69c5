"""What of a calibrated run fits a GPU. Knows nothing of how a layer is rounded."""

import torch

from qmix.config import MixtralConfig


def experts_at_once(config: MixtralConfig, device: torch.device) -> int:
    """How many experts are rounded together: as many as fit a GPU, and one on the CPU."""
    if device.type != "cuda":
        return 1
    hidden, inner = config.hidden_size, config.intermediate_size
    elements = max(3 * hidden * hidden + 8 * inner * hidden, 3 * inner * inner + 4 * inner * hidden)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(config.num_local_experts, int(0.8 * free / (4 * elements))))


def fitting_device(device: torch.device, token_bytes: int) -> torch.device:
    """Where the arrays of tokens lie: on a GPU if they take 60 % of its free memory at most.

    The rest is for the layer: moments, factors and one expert or more.
    """
    if device.type == "cuda" and token_bytes <= 0.6 * torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")
