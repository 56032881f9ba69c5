"""`auto` refuses what cannot be done before it measures a layer."""

import shutil

import pytest

from qmix.errors import CheckpointError, ResourceError, UsageError
from qmix.planning import machine
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from tests.support.calibration import TEXT, spoil, write_source


@pytest.fixture
def source(tmp_path):
    """Widths of 128, so that every scheme of `auto` fits."""
    return write_source(tmp_path / "source", hidden_size=128, intermediate_size=128)


def refused(source, error, match, **changes):
    """Quantize by `auto`; the error, with nothing measured and nothing left behind."""
    request = QuantizeRequest(method="auto", samples=2, seqlen=32, device="cpu", **changes)
    seen = []
    with pytest.raises(error, match=match) as caught:
        quantize_checkpoint(
            source, source.with_name("out"), request, TEXT, progress=lambda *at: seen.append(at)
        )
    assert {what for what, _, _ in seen} <= {"tokenizing"}
    assert [path.name for path in source.parent.iterdir()] == ["source"]
    return caught.value


def test_a_disk_too_small_is_refused_before_the_measuring(source, monkeypatch):
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert refused(source, ResourceError, "not enough free disk").exit_code == 4


def test_so_is_a_memory_too_small(source, monkeypatch):
    monkeypatch.setattr(
        machine, "memory", lambda: machine.HostMemory(total=1 << 20, available=1 << 10)
    )
    assert refused(source, ResourceError, "not enough free host memory").exit_code == 4


def test_so_is_a_layer_larger_than_a_file(source):
    refused(
        source,
        UsageError,
        r"--shard-size: each layer is written to one file.*expected at least \d+ B",
        shard_bytes=50_000,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_so_is_an_embedding_that_is_not_finite(source, value):
    name = "model.embed_tokens.weight"
    path = spoil(source, name, value)
    error = refused(source, CheckpointError, name)
    assert error.exit_code == 3
    assert str(path) in str(error)
