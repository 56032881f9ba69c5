"""The driver that Triton sees: a GPU of capability 8.0 whose code the interpreter runs.

Under `installed` a kernel is specialized, compiled to PTX and launched as on a GPU, on tensors of
the CPU. The assembler is left out: what Triton takes for the machine code is the PTX text.
"""

import gc
import struct
from contextlib import contextmanager

import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.support.ptx.machine import run
from tests.support.ptx.memory import GlobalMemory
from tests.support.ptx.source import parse

_SHARED_LIMIT = 163 * 1024
_MAX_THREADS = 1024
_LOWEST_ADDRESS = 1 << 20  # smaller numbers in an int64 tensor are no addresses
_FORMATS = {"fp32": "<f", "f32": "<f", "fp64": "<d"}


def _without_assembler(backend=None, stages=None, *_):
    """Triton asks for the name of this change too, to tell compiled kernels apart."""
    if stages is None:
        return "text for code", "text for code"
    stages["cubin"] = lambda text, metadata: text.encode()
    return None


class Device:
    """What Triton calls a driver.

    A kernel may use the tensors that it is given, and those into which the addresses of an int64
    tensor point.

    Attributes:
        change: called with a kernel's name and PTX text, gives the text that runs.
        launches: the name, grid and threads of each launch.
    """

    def __init__(self, change=None):
        self.change = change
        self.launches = []
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self):
        return "ptx"

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": _SHARED_LIMIT}

    def load_binary(self, name, binary, shared, device, *_):
        """(module, function, registers, spills, threads): the function is the PTX text."""
        text = binary if isinstance(binary, str) else binary.decode()
        return text, text, 0, 0, _MAX_THREADS

    def launch(self, name, text, grid, threads, shared, values, tensors):
        """Run a kernel; values are the bits of its parameters."""
        if self.change is not None:
            text = self.change(name, text)
        program = parse(text)
        self.launches.append((program.name, grid, threads))
        tables = [tensor for tensor in tensors if tensor.dtype == torch.int64]
        buffers = [*map(_extent, tensors), *_targets(tables)]
        names = [parameter for parameter, _ in program.parameters]
        padded = [*values, *[0] * (len(names) - len(values))]  # Triton's scratch: none is given
        bits = dict(zip(names, padded, strict=True))
        run(program, grid, threads, bits, GlobalMemory(buffers), shared)


class _Launcher:
    """Made for a compiled kernel; a launch goes to the device that is installed then."""

    def __init__(self, source, metadata):
        self._types = list(source.signature.values())
        self._metadata = metadata

    def __call__(
        self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments
    ):
        values, tensors = [], []
        for kind, argument in zip(self._types, arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                tensors.append(argument)
                values.append(argument.data_ptr())
            elif kind in _FORMATS:
                values.append(int.from_bytes(struct.pack(_FORMATS[kind], argument), "little"))
            else:
                values.append(int(argument))
        device = triton.runtime.driver.active
        device.launch(
            self._metadata.name, function, (x, y, z), self._metadata.num_warps * 32,
            self._metadata.shared, values, tensors,
        )  # fmt: skip


def _extent(tensor):
    """The address of a tensor and its bytes, from its first element to its last."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _targets(tables):
    """The extents of the largest tensors that hold the addresses in these tables."""
    addresses = {number for table in tables for number in table.flatten().tolist()}
    addresses = [number for number in addresses if number >= _LOWEST_ADDRESS]
    if not addresses:
        return
    tensors = [
        one for one in gc.get_objects() if type(one) is torch.Tensor and one.device.type == "cpu"
    ]
    extents = [_extent(tensor) for tensor in tensors]
    for address in addresses:
        around = [(n, start) for start, n in extents if start <= address < start + n]
        if around:
            nbytes, start = max(around)
            yield start, nbytes


def install(device):
    """Triton launches on this device from now on."""
    triton.runtime.driver.set_active(device)
    triton.knobs.runtime.add_stages_inspection_hook = _without_assembler


@contextmanager
def installed(device):
    """Triton launches on this device."""
    before = triton.runtime.driver._active, triton.knobs.runtime.add_stages_inspection_hook
    install(device)
    try:
        yield device
    finally:
        triton.runtime.driver._active, triton.knobs.runtime.add_stages_inspection_hook = before
