"""Files of torch.save: whatever they hold, tensors come of them or one error, and nothing runs."""

import ast
import io
import os
import pickle
import random
import shutil
import zipfile
from contextlib import suppress

import pytest
import torch

from qmix.commands.checkpoint.convert import convert_checkpoint
from qmix.commands.checkpoint.verify import verify
from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.files import pickles
from tests.support import raw_mistral
from tests.support.models import ROOT, small_model
from tests.support.process import qmix
from tests.support.raw_mistral import refused


@pytest.fixture(scope="module")
def model():
    return small_model().to(torch.bfloat16)


@pytest.fixture
def raw(model, tmp_path):
    """Eight pickles with stacked experts."""
    return raw_mistral.write(tmp_path / "raw", model)


class Canary:
    """Runs code when it is unpickled by pickle.load."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def archive(path, document, *, extra=()):
    """A torch.save file with another pickle in it, and records added."""
    whole = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            data = document if record.filename.endswith("/data.pkl") else old.read(record)
            new.writestr(record.filename, data)
        for name, data in extra:
            new.writestr(name, data)


@pytest.mark.parametrize("kind", ["torch.save", "pickle.dumps", "legacy", "archive"])
def test_code_in_a_pickle_is_refused_and_never_runs(raw, tmp_path, kind):
    path, canary = raw / "consolidated.04.pt", tmp_path / "canary"
    harmful = {**torch.load(path), "x": Canary(canary)}
    if kind == "torch.save":
        torch.save(harmful, path)
    elif kind == "legacy":
        torch.save(harmful, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle.dumps":
        path.write_bytes(pickle.dumps(harmful))
    else:
        archive(path, pickle.dumps({"x": Canary(canary)}, protocol=2))
    refused(raw, tmp_path, r"consolidated\.04\.pt", QmixError)
    assert not canary.exists()
    with suppress(Exception):  # the canary is alive: an unsafe reader would have run it
        torch.load(path, weights_only=False)
    assert canary.exists()


def test_what_a_harmful_pickle_asks_for_is_named_and_no_unsafe_way_is_offered(raw, tmp_path):
    path = raw / "consolidated.04.pt"
    torch.save({"x": Canary(tmp_path / "canary")}, path)
    with pytest.raises(CheckpointError, match=r"a call of posix\.mkdir") as caught:
        convert_checkpoint(raw, tmp_path / "out")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 100, 0.5, -1, -30])
def test_a_truncated_pickle_is_refused(raw, tmp_path, keep):
    path = raw / "consolidated.05.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(raw, tmp_path, r"consolidated\.05\.pt: .*(ends early|not a file of torch\.save)")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x00" * 5000, "not a file of torch.save"),
    ],
)
def test_files_of_another_kind_are_called_by_their_names(raw, tmp_path, data, match):
    (raw / "consolidated.05.pt").write_bytes(data)
    refused(raw, tmp_path, match)


def test_a_pickle_of_before_pytorch_1_6_is_refused_by_name(raw, tmp_path):
    path = raw / "consolidated.05.pt"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    refused(raw, tmp_path, r"1\.6", UnsupportedError)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([torch.zeros(3)], "not a dictionary"),
        (torch.zeros(3), "not a dictionary"),
        ({"norm.weight": {"nested": torch.zeros(3)}}, "norm.weight.*not a plain tensor.*dict"),
        ({"norm.weight": "text"}, "norm.weight.*not a plain tensor.*str"),
        ({3: torch.zeros(3)}, "3.*not a name"),
        ({"norm.weight": torch.zeros(3).to_sparse()}, "norm.weight.*not a plain tensor"),
        ({"norm.weight": torch.zeros(3, dtype=torch.complex64)}, "norm.weight.*complex64"),
        ({"norm.weight": torch.zeros(4, 6).T}, "norm.weight.*row by row"),
        ({"norm.weight": torch.zeros(1).expand(64)}, "norm.weight.*row by row"),
        ({"norm.weight": torch.zeros(3, device="meta")}, "norm.weight.*not a plain tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pickles_of_anything_but_plain_tensors_are_refused(raw, tmp_path, value, match):
    torch.save(value, raw / "consolidated.05.pt")
    refused(raw, tmp_path, match)


def test_parameters_and_slices_of_a_larger_tensor_are_tensors(raw, model, tmp_path):
    path = raw / "consolidated.00.pt"
    tensors = torch.load(path)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    longer = torch.cat([torch.zeros_like(tensors[name]), tensors[name]])
    slices = {name: longer[len(tensors[name]) :]}
    torch.save({n: torch.nn.Parameter(t) for n, t in {**tensors, **slices}.items()}, path)
    convert_checkpoint(raw, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ([("archive/constants.pkl", b"")], "TorchScript"),
        ([("other/data.pkl", b"")], "not a file of torch.save"),
        ([("archive/byteorder", b"big")], "byte order|appears twice"),
        ([("archive/data/0", b"")], "appears twice"),
    ],
    ids=["torchscript", "two pickles", "big", "twice"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_of_another_make_are_refused(raw, tmp_path, extra, match):
    whole = io.BytesIO()
    torch.save({"x": torch.zeros(4)}, whole)
    with zipfile.ZipFile(whole) as old:
        document = old.read("archive/data.pkl")
    archive(raw / "consolidated.05.pt", document, extra=extra)
    refused(raw, tmp_path, match)


def test_a_big_endian_archive_is_refused(raw, tmp_path):
    path = raw / "consolidated.05.pt"
    with zipfile.ZipFile(path) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records.items():
            new.writestr(name, b"big" if name.endswith("byteorder") else data)
    refused(raw, tmp_path, "byte order")


def test_a_compressed_archive_is_refused(raw, tmp_path):
    path = raw / "consolidated.05.pt"
    with zipfile.ZipFile(path) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records.items():
            new.writestr(name, data)
    refused(raw, tmp_path, "compressed")


def test_a_tensor_larger_than_its_record_is_refused(raw, tmp_path):
    whole = io.BytesIO()
    torch.save({"x": torch.zeros(100)}, whole)
    with zipfile.ZipFile(whole) as old:
        document = old.read("archive/data.pkl")
    # BININT1 100 ("K" and the byte) stands for the number of elements and for the shape.
    archive(raw / "consolidated.05.pt", document)  # whose record holds four elements
    refused(raw, tmp_path, "tensor x: .*expected 400 B.*found 16 B")


def test_damaged_pickles_are_refused_or_harmless(tmp_path):
    """Any byte of the pickle or of the archive's directory may be wrong: only QmixErrors result."""
    torch.save({f"t{index}": torch.zeros(8) for index in range(3)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    chance = random.Random(0)
    pickled = range(good.index(b"\x80\x02"), good.index(b"\x80\x02") + 400)
    path, refusals = tmp_path / "bad.pt", 0
    for _ in range(300):
        data = bytearray(good)
        where = chance.choice(pickled) if chance.random() < 0.7 else chance.randrange(len(data))
        data[where] = chance.randrange(256)
        path.write_bytes(data)
        try:
            for entry in pickles.read_entries(path).values():
                assert 0 <= entry.start <= entry.stop <= len(data)
        except (CheckpointError, UnsupportedError):
            refusals += 1
    assert 100 < refusals < 300


def test_a_pipe_in_place_of_a_pickle_never_blocks(raw, tmp_path):
    (raw / "consolidated.05.pt").unlink()
    os.mkfifo(raw / "consolidated.05.pt")
    refused(raw, tmp_path, "not a regular file")


def test_links_are_followed_into_a_hub_cache_and_anywhere_else(raw, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in raw.iterdir():
        shutil.copy(path, blobs / f"{path.name}-hash")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-hash")
    convert_checkpoint(snapshot, tmp_path / "out")
    assert verify(tmp_path / "out").problems == ()
    shutil.move(raw / "consolidated.05.pt", tmp_path / "elsewhere.pt")
    (raw / "consolidated.05.pt").symlink_to(tmp_path / "elsewhere.pt")
    (raw / "._consolidated.05.pt").write_bytes(b"")
    convert_checkpoint(raw, tmp_path / "linked")
    assert verify(tmp_path / "linked").problems == ()


def test_a_pytorch_whose_reader_has_a_known_hole_is_refused(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UnsupportedError, match=r"PyTorch 2\.10"):
        convert_checkpoint(raw, tmp_path / "out")


def test_only_one_file_unpickles_and_only_weights():
    """No other module of the project may call torch.load, or import a module that unpickles."""
    calls = []
    for base in ("qmix", "quantize", "evals"):
        for path in [*(ROOT / base).rglob("*.py"), ROOT / "cli.py"]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name.partition(".")[0] for alias in node.names}
                    names.add((getattr(node, "module", "") or "").partition(".")[0])
                    assert not names & {"pickle", "shelve", "marshal", "dill"}, path
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load"):
                    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    if ast.unparse(node.func) == "torch.load":
                        calls.append((path.name, keywords.get("weights_only")))
    assert calls == [("pickles.py", "True")]


def test_the_command_gives_one_line_and_exit_3(raw, tmp_path):
    canary = tmp_path / "canary"
    torch.save({"x": Canary(canary)}, raw / "consolidated.02.pt")
    done = qmix("convert", raw, tmp_path / "out")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("qmix: ")
    assert done.stdout == ""
    assert not canary.exists()
