"""What is read of a source is hashed, and a source that changes under a run is refused."""

import json
import os
import shutil
from contextlib import contextmanager

import pytest

from qmix.errors import CheckpointError
from qmix.formats.files import safetensors_header
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.quantize.source import open_source
from tests.support.calibration import TEXT, write_source

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    widths = {"hidden_size": 128, "intermediate_size": 128}  # whole groups of 128
    return write_source(tmp_path_factory.mktemp("made") / "source", **widths)


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made, tmp_path / "source")


def flip(folder, name, at=-1):
    """Change one byte of a tensor, and leave the file's times as far as that can be done."""
    for path in folder.glob("*.safetensors"):
        info = safetensors_header.read_header(path).get(name)
        if info is not None:
            times = path.stat()
            with path.open("r+b") as file:
                file.seek((info.start if at >= 0 else info.stop) + at)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def grow(folder):
    with next(folder.glob("*.safetensors")).open("ab") as file:
        file.write(b"more")


def edit_config(folder):
    document = json.loads((folder / "config.json").read_text())
    document["rope_theta"] = 5e5
    (folder / "config.json").write_text(json.dumps(document))


CHANGES = {
    "a tensor read early": lambda folder: flip(folder, EMBEDDING, 2),
    "a tensor read late": lambda folder: flip(folder, "lm_head.weight"),
    "an expert": lambda folder: flip(folder, EXPERT),
    "more bytes": grow,
    "another file": lambda folder: shutil.copy(
        next(folder.glob("*.safetensors")), folder / "model-9.safetensors"
    ),
    "config.json": edit_config,
    "the tokenizer": lambda folder: (folder / "tokenizer.model").write_bytes(b"other"),
    "a new companion": lambda folder: (folder / "generation_config.json").write_text("{}"),
}


def quantize(source, out, method, progress):
    calibrated = method in ("gptq", "auto")
    request = QuantizeRequest(
        method=method,
        group_size=32 if method in ("gptq", "rtn") else None,
        samples=4 if calibrated else None,
        seqlen=32 if calibrated else None,
        device="cpu" if calibrated else None,
        bits=8.0 if method == "auto" else None,
    )
    text = TEXT if calibrated else None
    return quantize_checkpoint(source, out, request, text, progress=progress)


@contextmanager
def refused():
    with pytest.raises(CheckpointError, match="the source changed while it was quantized") as found:
        yield
    assert found.value.exit_code == 3


def at_call(number, change, source):
    """A progress callback that changes the source at its call `number`; 0 is the last one."""
    calls = []

    def progress(what, done, total):
        last = what == "checksums" and what not in calls
        calls.append(what)
        if len(calls) == number or (number == 0 and last):
            change(source)

    return progress


@pytest.mark.parametrize("moment", [3, 0], ids=["early", "last"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_under_a_run_is_refused(source, tmp_path, change, moment):
    with refused():
        quantize(source, tmp_path / "out", "nf4", at_call(moment, CHANGES[change], source))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.diagonal
@pytest.mark.parametrize("change", ["a tensor read early", "an expert", "more bytes"])
@pytest.mark.parametrize("moment", [3, 0], ids=["early", "last"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "auto"])
def test_so_it_is_by_every_method(one_thread, source, tmp_path, method, moment, change):
    with refused():
        quantize(source, tmp_path / "out", method, at_call(moment, CHANGES[change], source))
    assert not (tmp_path / "out").exists()


def test_an_old_file_that_is_only_touched_is_the_same_source(source, tmp_path):
    for path in source.iterdir():
        os.utime(path, (1e9, 1e9))
    touched = at_call(0, lambda folder: [os.utime(path) for path in folder.iterdir()], source)
    quantize(source, tmp_path / "out", "nf4", touched)
    assert (tmp_path / "out").is_dir()


def test_a_second_reading_must_give_the_same_bytes(source):
    checkpoint = open_source(source)
    checkpoint.read(EXPERT)
    checkpoint.read(EXPERT)
    flip(source, EXPERT)
    checkpoint.read(EXPERT)
    with refused():
        checkpoint.wait()


def test_what_was_not_read_is_hashed_as_reading_it_would(source, monkeypatch):
    read, unread = open_source(source), open_source(source)
    for tensor in read.tensors:
        read.read(tensor.name)
    read.wait()
    monkeypatch.setattr("qmix.quantize.source._CHUNK_BYTES", 1000)
    seen = []
    unread.read(EXPERT)
    unread.hash_unread(lambda done, total: seen.append((done, total)))
    assert unread.digests == read.digests
    assert seen[-1][0] == seen[-1][1]
