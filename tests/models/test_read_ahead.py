"""Reading ahead: order, buffers in turn, values, errors, and what is built on the device."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qmix.errors import CheckpointError
from qmix.formats import open_checkpoint
from qmix.formats.files import spans
from qmix.formats.files.spans import Together
from qmix.models import read_ahead as ahead
from qmix.models.quantization import BitsAndBytesConfig, of_checkpoint
from qmix.planning.budget import READ_AHEAD
from qmix.weights.affine import Affine, reorder_codes
from qmix.weights.scheme import NF4, Scheme
from qmix.weights.table import Table
from tests.support.models import quantized, write_dense
from tests.support.process import PATIENCE

INT4 = Scheme(kind="int4", group_size=32, symmetric=False)


DEVICE = torch.device("cuda:1")


class OnDevice(Tensor):
    """A tensor of a device: numpy does not see it, and no operation takes a host's beside it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        values = [*args, *(kwargs or {}).values()]
        values += [part for value in values if isinstance(value, (list, tuple)) for part in value]
        name = getattr(function, "__name__", "")
        if any(type(value) is Tensor and value.dim() for value in values):
            raise AssertionError(f"{name} takes a tensor of the host")
        if name in ("numpy", "data_ptr"):
            raise AssertionError(f"{name} of a tensor on the device")
        if name == "cpu":
            return args[0].as_subclass(Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})

    device, is_cpu = DEVICE, False


class Factories(TorchFunctionMode):
    """Makes what is asked for on the device a tensor of it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") != DEVICE:
            return function(*args, **kwargs)
        return function(*args, **{**kwargs, "device": "cpu"}).as_subclass(OnDevice)


class Late:
    """Copies from a buffer when it is asked for again, and not before."""

    def __init__(self, nbytes, on_device=OnDevice):
        self._buffers = [torch.full((nbytes,), 0xEE, dtype=torch.uint8) for _ in range(READ_AHEAD)]
        self._pending: list = [[] for _ in range(READ_AHEAD)]
        self._on_device = on_device

    def buffer(self, index):
        self.arrive(index)
        self._buffers[index].fill_(0xEE)
        return self._buffers[index]

    def arrive(self, index):
        for source, target in self._pending[index]:
            target.copy_(source)
        self._pending[index] = []

    def copied(self, index, tensors):
        targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self._pending[index] = [(tensors[name], targets[name]) for name in tensors]
        return {name: target.as_subclass(self._on_device) for name, target in targets.items()}


def uploaded(checkpoint, tensors, on_device=OnDevice):
    upload = Late(ahead.buffer_bytes(checkpoint, tensors), on_device)
    reading = ahead.read_ahead(checkpoint, tensors, Together(), upload)
    for index, (tensor, read) in enumerate(reading):
        upload.arrive(index % READ_AHEAD)
        yield tensor, read


def parts(weight):
    """The tensors of a weight, on the host."""
    values = vars(weight).values()
    nested = [vars(value).values() for value in values if hasattr(value, "__dataclass_fields__")]
    flat = [part for value in (values, *nested) for part in value if isinstance(part, Tensor)]
    return [part.as_subclass(Tensor) for part in flat]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("folders")
    dense = write_dense(base / "dense", num_hidden_layers=1)
    return {
        "dense": dense,
        "nf4": quantized(dense, base / "nf4", NF4),
        "gptq": quantized(dense, base / "gptq", INT4, method="rtn"),
    }


@pytest.mark.parametrize("kind", ["dense", "nf4", "gptq"])
def test_each_weight_is_built_on_the_device_and_is_the_hosts(folders, kind):
    checkpoint = open_checkpoint(folders[kind])
    tensors = [tensor for tensor in checkpoint.tensors if tensor.linear]
    seen = []
    for tensor, read in uploaded(checkpoint, tensors):
        assert checkpoint.built_anywhere(tensor)
        with Factories():
            built = checkpoint.built(tensor, read)
        own = checkpoint.weight(tensor)
        assert type(built) is type(own)
        for one, other in zip(parts(built), parts(own), strict=True):
            assert torch.equal(one, other)
        seen.append(tensor)
    assert seen == tensors
    assert {type(checkpoint.weight(t)) for t in tensors} & {Table, Affine} or kind == "dense"


def test_what_the_host_rounds_is_read_beside_the_buffers(folders):
    checkpoint = of_checkpoint(
        open_checkpoint(folders["dense"]), BitsAndBytesConfig(load_in_4bit=True)
    )
    tensors = [tensor for tensor in checkpoint.tensors if tensor.linear]
    kinds = set()
    for tensor, read in uploaded(checkpoint, tensors):
        weight = checkpoint.built(tensor, read)
        on_host = not checkpoint.built_anywhere(tensor)
        assert on_host == isinstance(weight, Table)
        kinds.add(on_host)
    assert kinds == {True, False}


def test_the_next_weights_are_read_while_this_one_is_used(folders):
    checkpoint = open_checkpoint(folders["nf4"])
    begun = [threading.Event() for _ in checkpoint.tensors]

    class Watched(type(checkpoint)):
        def read_together(self, names, into, together):
            begun[list(map(self.stored, self.tensors)).index(names)].set()
            return super().read_together(names, into, together)

    watched = Watched(**vars(checkpoint))
    for index, _ in enumerate(uploaded(watched, watched.tensors, Tensor)):
        for following in begun[index : index + READ_AHEAD]:
            assert following.wait(PATIENCE)
        assert not any(
            event.is_set() for event in begun[index + READ_AHEAD :]
        )  # its buffer is in use


def test_a_damaged_file_is_the_loaders_error(folders, tmp_path):
    checkpoint = open_checkpoint(folders["nf4"])
    tensors = checkpoint.tensors
    entries = dict(checkpoint.shards.entries)
    name = checkpoint.stored_names[checkpoint.stored(tensors[3])[0]]
    short = tmp_path / "short"
    short.write_bytes(b"")
    entries[name] = replace(entries[name], file=short)
    damaged = replace(checkpoint, shards=replace(checkpoint.shards, entries=entries))
    reading = uploaded(damaged, tensors, Tensor)
    assert [next(reading)[0] for _ in range(3)] == list(tensors[:3])
    with pytest.raises(CheckpointError, match="ends early"):
        next(reading)
    assert not [t for t in threading.enumerate() if t.name.startswith("qmix-reader")]


def test_a_loader_that_is_stopped_leaves_no_thread(folders):
    checkpoint = open_checkpoint(folders["nf4"])
    reading = uploaded(checkpoint, checkpoint.tensors, Tensor)
    next(reading)
    reading.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("qmix-reader")]


@pytest.mark.parametrize("room", [0, 1 << 60], ids=["past the cache", "through it"])
@pytest.mark.parametrize("kind", ["dense", "nf4", "gptq"])
def test_the_host_reads_what_the_files_hold_into_memory_of_the_weights(
    folders, kind, room, monkeypatch
):
    checkpoint = open_checkpoint(folders[kind])
    ways, opened = set(), spans.opened

    def watched(file, *, past_cache, what):
        ways.add(past_cache)
        return opened(file, past_cache=past_cache, what=what)

    monkeypatch.setattr(spans, "opened", watched)
    monkeypatch.setattr(ahead.machine, "cache_room", lambda *, beside: room - beside)
    read = list(ahead.read_all(checkpoint, checkpoint.tensors, torch.device("cpu")))
    assert ways == (set() if room else {True})
    assert [tensor for tensor, _ in read] == list(checkpoint.tensors)
    starts = [part.data_ptr() for _, parts in read for part in parts.values()]
    assert len(set(starts)) == len(starts)  # nothing is overwritten by what is read later
    for tensor, parts_read in read:
        for name, own in checkpoint.read_all(tensor).items():
            assert torch.equal(parts_read[name], own)


def test_the_host_keeps_in_the_cache_what_has_room_beside_the_model(folders, monkeypatch):
    checkpoint, asked = open_checkpoint(folders["nf4"]), []
    nbytes = sum(map(checkpoint.stored_bytes, checkpoint.tensors))

    def room(*, beside):
        asked.append(beside)
        return nbytes

    monkeypatch.setattr(ahead.machine, "cache_room", room)
    reading = ahead.read_all(checkpoint, checkpoint.tensors, torch.device("cpu"))
    next(reading)
    reading.close()
    assert asked == [nbytes]
    assert not [t for t in threading.enumerate() if t.name.startswith("qmix-reader")]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_reordered_on_a_device_as_on_the_host(bits):
    codes = torch.randint(0, 256, (70, 64 * bits // 8), dtype=torch.uint8)
    order = torch.randperm(64)
    with Factories():
        out = reorder_codes(codes.as_subclass(OnDevice), order.as_subclass(OnDevice), bits)
    assert torch.equal(out.as_subclass(Tensor), reorder_codes(codes, order, bits))
