"""Step `bandwidth`: what the device's memory and matrix units can do, the bounds of other steps."""

from collections.abc import Iterator

import torch

from qmix.evals.steps.setting import Setting
from qmix.evals.timing.bandwidth import (
    copy_bandwidth,
    interconnect_bandwidth,
    matmul_rate,
    read_bandwidth,
)


def results(setting: Setting) -> Iterator[dict[str, object]]:
    """Copy and read bandwidth, the interconnect, and the rate of a square matmul."""
    device = setting.device
    gpu = device.type == "cuda"
    size = 1 << 20 if setting.is_rehearsal else 1 << 31 if gpu else 1 << 27
    yield {"what": "copy", "gigabytes_per_second": copy_bandwidth(device, size) / 1e9}
    yield {"what": "read (torch.sum)", "gigabytes_per_second": read_bandwidth(device, size) / 1e9}
    width, dtype = (8192, torch.bfloat16) if gpu else (512, torch.float32)
    rate = matmul_rate(device, dtype, width)
    yield {"what": f"matmul {width} {str(dtype)[6:]}", "teraflops": rate / 1e12}
    if gpu:
        rate = interconnect_bandwidth(device)
        yield {"what": "pinned host memory to GPU", "gigabytes_per_second": rate / 1e9}
