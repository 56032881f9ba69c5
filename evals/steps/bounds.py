"""Step `bandwidth`: what the device's memory and matrix units can do, the bounds of other steps."""

from collections.abc import Iterator

import torch

from qmix.evals.timing.bandwidth import copy_bandwidth, matmul_rate, read_bandwidth


def results(device: torch.device) -> Iterator[dict[str, object]]:
    """Copy and read bandwidth, and the rate of a square matmul, bf16 or on a CPU float32."""
    yield {"what": "copy", "gigabytes_per_second": copy_bandwidth(device) / 1e9}
    size = 1 << 31 if device.type == "cuda" else 1 << 27
    yield {"what": "read (torch.sum)", "gigabytes_per_second": read_bandwidth(device, size) / 1e9}
    width, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    rate = matmul_rate(device, dtype, width)
    yield {"what": f"matmul {width} {str(dtype)[6:]}", "teraflops": rate / 1e12}
