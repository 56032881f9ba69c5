"""Tokens in memory and in a file are the same to whoever reads them."""

import errno
import hashlib
import os

import pytest
import torch

from qmix.errors import CheckpointError, WriteError
from qmix.quantize.calibrated import activations
from qmix.quantize.calibrated.activations import Activations

TOKENS, WIDTH = 50, 7


def both(folder):
    return [Activations(TOKENS, WIDTH), Activations(TOKENS, WIDTH, folder / "tokens.f32")]


def values(rows, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1 << 24, 40], ids=["one run", "many runs"])
def pair(tmp_path, monkeypatch, request):
    monkeypatch.setattr(activations, "_CHUNK_BYTES", request.param)
    return both(tmp_path)


INDICES = [
    [], [0], [49], [0, 1, 2, 3], [5, 6, 20, 48, 49], [0, 2, 4, 6], list(range(50)),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_rows_are_read_and_added_to_alike(pair, index):
    rows = torch.tensor(index, dtype=torch.int64)
    expected = values(TOKENS)
    for array in pair:
        assert array.nbytes == 4 * TOKENS * WIDTH
        assert not array.read(0, TOKENS).any()
        array.write(0, expected)
        assert torch.equal(array.rows(rows), expected[rows])
        array.add_rows(rows, values(len(index), 1))
    expected[rows] += values(len(index), 1)
    for array in pair:
        assert torch.equal(array.read(0, TOKENS), expected)
        assert torch.equal(array.read(13, 29), expected[13:29])


def test_16_bits_are_kept_in_16_bits(tmp_path):
    path, expected = tmp_path / "tokens.bf16", values(TOKENS).bfloat16()
    for array in (
        Activations(TOKENS, WIDTH, dtype=torch.bfloat16),
        Activations(TOKENS, WIDTH, tmp_path / "writing", dtype=torch.bfloat16),
    ):
        array.write_final(0, values(TOKENS))
        assert array.save(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.stat().st_size == 2 * TOKENS * WIDTH == array.nbytes
        for in_memory in (True, False):  # the file itself changes last
            loaded = Activations.load(
                path, TOKENS, WIDTH, in_memory=in_memory, dtype=torch.bfloat16
            )
            assert torch.equal(loaded.read(0, TOKENS), expected)
            loaded.add_rows(torch.tensor([1, 4]), expected[:2])
            assert torch.equal(loaded.rows(torch.tensor([4]))[0], expected[4] + expected[1])
        path.write_bytes(expected.view(torch.uint8).numpy().tobytes())


def test_what_is_read_is_no_view_and_any_dtype_is_written(pair):
    for array in pair:
        array.write(10, values(5).double())
        assert torch.equal(array.read(10, 15), values(5))
        assert not array.read(0, 10).any()
        array.read(10, 15).zero_()
        array.rows(torch.tensor([10])).zero_()
        assert torch.equal(array.read(10, 15), values(5))
        array.write(0, values(WIDTH).T[:, :WIDTH])  # not contiguous
        assert torch.equal(array.read(0, WIDTH), values(WIDTH).T)


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_was_saved_is_loaded(tmp_path, pair, in_memory):
    for number, array in enumerate(pair):
        array.write_final(0, values(TOKENS)[:20])
        array.write_final(20, values(TOKENS)[20:])
        place = tmp_path / f"saved-{number}"
        digest = array.save(place)
        assert digest == hashlib.sha256(place.read_bytes()).hexdigest()
        assert place.stat().st_size == array.nbytes
        assert torch.equal(array.read(0, TOKENS), values(TOKENS))  # still usable
        again = Activations.load(place, TOKENS, WIDTH, in_memory=in_memory)
        assert torch.equal(again.read(0, TOKENS), values(TOKENS))
        assert (again.path is None) == in_memory
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved-0", "saved-1"]


def test_a_save_replaces_what_stood_there(tmp_path, pair):
    place = tmp_path / "saved"
    for array in pair:
        place.write_bytes(b"of an earlier attempt")
        array.write_final(0, values(TOKENS))
        array.save(place)
        assert place.stat().st_size == array.nbytes


@pytest.mark.parametrize("size", [0, 4 * TOKENS * WIDTH - 1, 4 * TOKENS * WIDTH + 4])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_of_another_size_is_refused_and_left_alone(tmp_path, size, in_memory):
    place = tmp_path / "saved"
    place.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=r"saved: wrong size; expected 1400 B; found \d+ B"):
        Activations.load(place, TOKENS, WIDTH, in_memory=in_memory)
    assert place.stat().st_size == size


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_missing_file_is_named_and_not_made(tmp_path, in_memory):
    with pytest.raises(CheckpointError, match=r"saved: missing"):
        Activations.load(tmp_path / "saved", TOKENS, WIDTH, in_memory=in_memory)
    assert not list(tmp_path.iterdir())


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path):
    array = Activations(TOKENS, WIDTH, tmp_path / "tokens.f32")
    with (tmp_path / "tokens.f32").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=r"tokens\.f32: ends early"):
        array.read(0, TOKENS)


CALLS = {
    "preadv": lambda array: array.read(0, 1),
    "pwrite": lambda array: array.write(0, values(1)),
    "fsync": lambda array: array.save(array.path.with_name("saved")),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_the_system_names_the_file(tmp_path, monkeypatch, call):
    array = Activations(TOKENS, WIDTH, tmp_path / "tokens.f32")
    array.write_final(0, values(TOKENS))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises((OSError, CheckpointError), match=r"tokens\.f32") as found:
        CALLS[call](array)
    assert isinstance(found.value, CheckpointError) == (call == "preadv")
    assert isinstance(found.value, WriteError) == (call != "preadv")


def test_a_file_that_is_gone_is_an_error_of_reading_or_of_writing(tmp_path):
    array = Activations(TOKENS, WIDTH, tmp_path / "tokens.f32")
    (tmp_path / "tokens.f32").unlink()
    with pytest.raises(CheckpointError, match=r"tokens\.f32: cannot be read"):
        array.read(0, 1)
    with pytest.raises(WriteError, match=r"tokens\.f32: cannot be written"):
        array.write(0, values(1))
    assert not list(tmp_path.iterdir())
