"""How a checkpoint is loaded: dtype, device, memory budgets and backend, parsed and checked once.

Knows no file and no model.
"""

from dataclasses import dataclass

import torch

from qmix.config_rules import MAX_POSITIONS
from qmix.errors import ResourceError, UsageError
from qmix.kernels.backend import Backend
from qmix.kernels.backend import named as named_backend
from qmix.kv_format import KVFormat
from qmix.kv_format import named as named_kv
from qmix.models import option_names
from qmix.planning.byte_sizes import parse_size


@dataclass(frozen=True, init=False)
class LoadOptions:
    """How a checkpoint is loaded.

    Attributes:
        dtype: of dense weights and activations; None: the checkpoint's.
        device: the GPU if there is one, unless another device is given.
        vram, ram: bytes to use at most on the GPU and on the host, including what the process
            already uses; None: no limit but the free memory.
        max_context: positions that the budgets leave room for; None: 4096, or the model's if fewer.
        max_batch: rows of so many positions that they leave room for.
        backend: whose code multiplies; None: the best that is right on the device.
        kv: how the model's caches keep keys and values.
    """

    dtype: torch.dtype | None
    device: torch.device
    vram: int | None
    ram: int | None
    max_context: int | None
    max_batch: int
    backend: Backend | None
    kv: KVFormat

    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        vram: str | int | None = None,
        ram: str | int | None = None,
        max_context: int | None = None,
        max_batch: int = 1,
        backend: str | None = None,
        kv: str | None = None,
    ) -> None:
        """Parse names of dtypes, devices, backends and caches, and sizes: "16GiB", "16GB" or bytes.

        Args:
            backend: None: what QMIX_BACKEND names, or `auto`.
            kv: "16" or "int8"; None: "16".

        Raises:
            UsageError: an unknown dtype, device, backend or cache, a malformed size, or vram
                without a GPU.
            ResourceError: a CUDA device is asked for and none is available.
        """
        target = parse_device(device)
        _check_whole("max_batch", max_batch, MAX_POSITIONS)
        if max_context is not None:
            _check_whole("max_context", max_context, MAX_POSITIONS)
        if vram is not None and target.type != "cuda":
            raise UsageError(
                "the CPU has no device memory to budget",
                where="vram",
                found=target,
                remedy="Give ram.",
            )
        parsed = {
            "dtype": parse_dtype(dtype),
            "device": target,
            "vram": None if vram is None else parse_size(vram, where="vram"),
            "ram": None if ram is None else parse_size(ram, where="ram"),
            "max_context": max_context,
            "max_batch": max_batch,
            "backend": named_backend(backend),
            "kv": named_kv(kv),
        }
        for name, value in parsed.items():
            object.__setattr__(self, name, value)


def _check_whole(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise UsageError(
            "out of range",
            where=name,
            expected=f"an integer from 1 to {most}",
            found=repr(value)[:80],
        )


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype of a name, long or short, with or without `torch.`.

    None for None and "auto".

    Raises:
        UsageError: another name.
    """
    name = option_names.AUTO if dtype is None else option_names.dtype_name(str(dtype))
    if name == option_names.AUTO:
        return None
    found: torch.dtype = getattr(torch, name)
    return found


def parse_device(device: torch.device | str | None) -> torch.device:
    """The device of a name; None: the GPU if there is one, else the CPU. "gpu" stands for "cuda".

    Raises:
        UsageError: no such device.
        ResourceError: no CUDA device is available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        named = option_names.device_name(device) if isinstance(device, str) else device
        target = torch.device(named)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise option_names.no_device(device) from None
    if target.type not in ("cpu", "cuda"):
        raise option_names.no_device(target)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "no CUDA device is available",
            where="device",
            found=str(target),
            remedy="Use --device cpu, or check the driver.",
        )
    return target
