"""LoadOptions: parsed and checked once, from strings or objects; the same by either door."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from qmix.errors import ResourceError, UsageError
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.options import LoadOptions, parse_device
from tests.support.models import TINY


def test_strings_and_objects_become_the_same_options():
    parsed = LoadOptions(dtype="torch.bfloat16", device="cpu", ram="2GiB", max_context=8)
    assert parsed == LoadOptions(
        dtype=torch.bfloat16, device=torch.device("cpu"), ram=1 << 31, max_context=8
    )
    assert (parsed.dtype, parsed.ram) == (torch.bfloat16, 1 << 31)
    assert hash(parsed) == hash(replace(parsed))
    assert replace(parsed, ram="4GiB").ram == 1 << 32
    with pytest.raises(FrozenInstanceError):
        parsed.ram = 5


@pytest.mark.parametrize(
    ("short", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("BF16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
    ],
    ids=str,
)
def test_dtypes_have_short_names(short, dtype):
    assert LoadOptions(dtype=short, device="cpu").dtype == dtype


def test_gpu_is_a_name_of_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_device("gpu") == torch.device("cuda")
    assert parse_device("GPU:1") == torch.device("cuda", 1)


def test_what_nobody_gave_is_left_to_the_checkpoint_and_the_machine():
    plain = LoadOptions()
    assert (plain.dtype, plain.vram, plain.ram, plain.max_context) == (None,) * 4
    assert plain.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert LoadOptions(dtype="auto").dtype is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dtype": "int3"}, "dtype: no such dtype.*int3"),
        ({"device": "abacus"}, "device: no such device"),
        ({"device": "meta"}, "device: no such device.*meta"),
        ({"device": torch.device("meta")}, "device: no such device.*meta"),
        ({"device": "cpu:x"}, "device: no such device.*cpu:x"),
        ({"device": "cpu:99999999999"}, "device: no such device"),
        ({"device": "cpu", "vram": "8GiB"}, "vram: the CPU has no device memory"),
        ({"ram": "24Q"}, "ram: not a size.*24Q"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(given, named):
    with pytest.raises(UsageError, match=named):
        LoadOptions(**given)


def test_a_device_that_is_not_there_is_a_lack_of_resources():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ResourceError, match="no CUDA device"):
        LoadOptions(device="cuda")


def test_a_model_loads_by_the_object_as_by_its_fields():
    options = LoadOptions(dtype="float16", device="cpu")
    model = MixtralForCausalLM.from_pretrained(TINY, load_options=options)
    assert model.dtype == torch.float16
    with pytest.raises(UsageError, match="load_options"):
        MixtralForCausalLM.from_pretrained(TINY, load_options=options, device="cpu")
