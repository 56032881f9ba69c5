"""Two fake GPUs: whatever is launched, copied or recorded runs under the device of its tensors."""

import ast
from contextlib import contextmanager, nullcontext

import pytest
import torch

from qmix.experts import cuda_memory
from qmix.experts.copiers import CudaCopier
from qmix.generation import host_copy
from qmix.generation.static_decoder import StaticDecoder
from qmix.kernels.gpu.current_device import on, side_stream
from qmix.kernels.gpu.launch import launch
from qmix.models.read_ahead import CudaUpload
from qmix.tuning.device_clock import CudaClock
from tests.support import house

SECOND = torch.device("cuda:1")


class OnSecond(torch.Tensor):
    """A tensor of the host that says it lies on the second GPU."""

    device, is_cuda = SECOND, True

    def copy_(self, source, non_blocking=False):
        return self

    def pin_memory(self):
        Gpus.used.append(("pin", Gpus.current))
        return self

    def to(self, *_, **__):
        return self


class Gpus:
    """The current device, and under which device each thing was made."""

    current, used = 0, []

    @classmethod
    @contextmanager
    def device(cls, device):
        before, cls.current = cls.current, device.index
        try:
            yield
        finally:
            cls.current = before

    @classmethod
    def made(cls, what):
        class Made:
            device = SECOND

            def __init__(self, *_, **__):
                cls.used.append((what, cls.current))

            def record(self, stream=None):
                cls.used.append((f"{what}.record", cls.current))

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 2.0

            def wait_stream(self, stream):
                cls.used.append((f"{what}.wait", cls.current))

        return Made


@pytest.fixture
def used(monkeypatch):
    monkeypatch.setattr(Gpus, "used", [])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: Gpus.current)
    monkeypatch.setattr(torch.cuda, "device", Gpus.device)
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Gpus.made(name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Gpus.made("current")())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    empty = torch.empty
    for module in (host_copy.torch,):
        monkeypatch.setattr(
            module, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more)
        )
    yield Gpus.used
    assert Gpus.current == 0


def second(*values):
    return torch.tensor(values).as_subclass(OnSecond)


def test_a_device_is_current_within_its_block_only(used):
    with on(SECOND):
        assert Gpus.current == 1
        with on(SECOND), on(torch.device("cpu")):
            assert Gpus.current == 1
    for other in ("cpu", "meta", "cuda", "cuda:0"):
        with on(torch.device(other)):
            assert Gpus.current == 0


def test_a_kernel_is_launched_under_its_first_tensors_device(used):
    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: used.append(("launch", Gpus.current))

    launch(Kernel(), (1,), None, second(1), 3)
    launch(Kernel(), (1,), torch.ones(1), 3)
    assert used == [("launch", 1), ("launch", 0)]


def test_the_copier_works_under_its_device(used):
    copier = CudaCopier(SECOND)
    copier.copy(second(1), second(2))
    copier.write(second(1), second(2))
    copier.read(second(1))
    assert {"Stream", "Event", "Event.record", "pin"} <= {what for what, _ in used}
    assert {device for _, device in used} == {1}


def test_a_side_stream_is_its_devices_and_follows_what_was_enqueued(used, monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: Gpus.made("default")())
    with side_stream(SECOND):
        assert Gpus.current == 1
    assert ("Stream.wait", 1) in used
    assert {device for _, device in used} == {1}
    with side_stream(torch.device("cpu")):
        assert Gpus.current == 0


def test_values_on_their_way_to_the_host_are_under_their_device(used):
    host_copy.HostCopy(second(1, 2))
    host_copy.to_device(second(1), SECOND)
    assert {"Event", "pin"} <= {what for what, _ in used}
    assert {device for _, device in used} == {1}


def test_a_step_is_launched_and_recorded_under_its_models_device(used):
    class Decoder(StaticDecoder):
        def __init__(self):
            self.ids, self._store = second(1), None

        def _step(self, ids):
            used.append(("step", Gpus.current))

    Decoder().step()
    assert used == [("step", 1)]


def test_work_is_timed_on_its_device(used):
    clock = CudaClock(SECOND)
    assert clock.microseconds(lambda: used.append(("run", Gpus.current))) == 2000
    assert {"Event", "Event.record", "run"} == {what for what, _ in used}
    assert {device for _, device in used} == {1}


def test_weights_are_uploaded_under_their_device(used, monkeypatch):
    class Runtime:
        def register(self, pointer, size):
            used.append(("pin", Gpus.current))
            return 0

        def unregister(self, pointer):
            pass

        def device_pointer(self, pointer):
            return pointer

    monkeypatch.setattr(cuda_memory, "CudaMemory", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with CudaUpload.opened(4096, SECOND) as upload:
        upload.copied(0, {"weight": second(1)})
        assert len(upload.buffer(0)) == 4096
    assert {"pin", "Event", "Event.record"} <= {what for what, _ in used}
    assert {device for _, device in used} == {1}


# Where the caller's block must hold: a function that says "on the current device".
CALLERS = {("qmix.generation.cuda_graph", "record")}
MADE = ("Stream", "Event", "CUDAGraph", "graph", "graph_pool_handle", "cudart")


def made_outside(tree):
    """What needs a current device, outside of a block `with on(...)`, by its function."""

    def visit(node, function, guarded):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.With):
            guarded = guarded or any(
                "on(" in ast.unparse(item.context_expr)[:3] for item in node.items
            )
        if isinstance(node, ast.Call) and not guarded:
            called = node.func
            subscript = isinstance(called, ast.Subscript) and isinstance(called.slice, ast.Name)
            if subscript and called.slice.id == "grid":
                yield function, "launch"
            if ast.unparse(called) in {f"torch.cuda.{name}" for name in MADE}:
                yield function, ast.unparse(called)
            pins = any(keyword.arg == "pin_memory" for keyword in node.keywords)
            if pins or ast.unparse(called).endswith(".pin_memory"):
                yield function, "pin_memory"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, guarded)

    return set(visit(tree, None, guarded=False))


def test_nothing_that_needs_a_current_device_is_outside_of_a_block():
    found = {
        (name, function, what)
        for name, path in house.modules().items()
        if name.startswith("qmix.") and not name.startswith("qmix.evals")
        for function, what in made_outside(ast.parse(path.read_text()))
        if (name, function) not in CALLERS
    }
    assert found == {("qmix.experts.cuda_memory", "__init__", "torch.cuda.cudart")}


def test_a_launch_outside_of_launch_would_be_found():
    assert made_outside(ast.parse("def f():\n  kernel[grid](x)")) == {("f", "launch")}
    assert not made_outside(ast.parse("def f():\n  with on(d):\n    kernel[grid](x)"))


def test_kernels_are_launched_by_launch_alone():
    """A subscripted call of a module's kernel is a launch, whatever its grid is called."""
    for name, path in house.modules().items():
        if not name.startswith("qmix.kernels.gpu.") or name.endswith("_triton"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert name == "qmix.kernels.gpu.launch", (name, node.lineno)
