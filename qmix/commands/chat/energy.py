"""Energy of a GPU, where NVML can be asked: nvidia-ml-py is used if it is there.

Knows no model.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Meter:
    """Counts the energy of one device from now on.

    Attributes:
        handle: NVML's; None where nothing can be asked.
        begun_mj: the driver's counter at the start, in millijoules.
    """

    handle: Any = None
    begun_mj: int = 0

    @classmethod
    def of(cls, device: torch.device) -> "Meter":
        """A meter of a device; one that tells nothing, if it is no GPU or there is no NVML."""
        if device.type != "cuda":
            return cls()
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            return cls(handle, pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except Exception:  # noqa: BLE001 - no package, no driver, an old card: nothing to show
            return cls()

    def joules(self) -> float | None:
        """Energy since the start; None if it cannot be told."""
        if self.handle is None:
            return None
        import pynvml

        try:
            now_mj = pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)
        except pynvml.NVMLError:
            return None
        return float(now_mj - self.begun_mj) / 1000
