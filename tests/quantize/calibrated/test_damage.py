"""A run that goes on trusts nothing: what is damaged is made again or refused by its name."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from qmix.errors import CheckpointError, InterruptedRunError, QmixError, UsageError
from qmix.formats import open_checkpoint
from qmix.formats.files import manifest
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.resume import sealed
from qmix.weights.scheme import Recipe, Scheme
from tests.support.calibration import contents, run, write_source
from tests.support.models import threads
from tests.support.soak import SEED, gate_and_soak

LAYERS = 3
STATE = manifest.STATE
SHARDS = [f"model-0000{number}-of-00005.safetensors" for number in (2, 3)]  # of two layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, what a whole run makes of it, and what runs of one and of two layers leave."""
    folder = tmp_path_factory.mktemp("made")
    source = write_source(folder / "source", num_hidden_layers=LAYERS, num_local_experts=2)
    with threads(1):
        run(source, folder / "out")
        expected = contents(folder / "out")
        left = {}
        for layers in (1, 2):
            calls = iter([False] * (layers - 1) + [True])
            with pytest.raises(InterruptedRunError):
                run(source, folder / f"{layers}", interrupted=lambda calls=calls: next(calls))
            left[layers] = folder / f"{layers}.partial"
    return source, expected, left


@pytest.fixture
def stopped(made, tmp_path):
    """(source, OUT, what the whole run gives) of a run that stopped after its first layer."""
    return stopped_after(1, made, tmp_path)


def stopped_after(layers, made, tmp_path):
    source, expected, left = made
    shutil.copytree(source, tmp_path / "source")
    shutil.copytree(left[layers], tmp_path / "out.partial")
    return tmp_path / "source", tmp_path / "out", expected


def flip(path, at=-2):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


DAMAGES = {
    "one bit": flip,
    "a bit of the header": lambda path: flip(path, 200),
    "a bit of the first byte": lambda path: flip(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 4),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
}


LEFT = [*SHARDS, "tokens-00002.f32", "exact-00002.f32"]


@pytest.mark.diagonal
@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["in memory", "in files"])
def test_what_is_damaged_is_made_again(made, tmp_path, name, damage, budget):
    source, out, expected = stopped_after(2, made, tmp_path)
    DAMAGES[damage](out.with_name("out.partial") / name)
    run(source, out, resumed=True, activation_bytes=budget)
    assert contents(out) == expected


def test_everything_may_be_damaged_at_once(stopped):
    source, out, expected = stopped
    for path in out.with_name("out.partial").iterdir():
        if path.suffix in (".safetensors", ".f32"):
            flip(path)
    run(source, out, resumed=True)
    assert contents(out) == expected


@pytest.mark.parametrize("name", [SHARDS[0], "tokens-00001.f32"])
def test_what_the_disk_cannot_read_is_made_again(stopped, monkeypatch, name):
    source, out, expected = stopped
    lost = out.with_name("out.partial") / name
    fdopen, failed = os.fdopen, []

    def failing(descriptor, *mode):
        if os.readlink(f"/proc/self/fd/{descriptor}") != str(lost) or failed:
            return fdopen(descriptor, *mode)
        os.close(descriptor)
        failed.append(name)
        return open("/proc/self/mem", "rb")  # Linux: a read at its start is EIO

    monkeypatch.setattr(os, "fdopen", failing)
    run(source, out, resumed=True)
    assert failed
    assert contents(out) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": Recipe.uniform(Scheme(kind="int4", group_size=32), attention=False)},
        {"recipe": Recipe.uniform(Scheme(kind="int8", group_size=32), attention=True)},
        {
            "recipe": Recipe.uniform(
                Scheme(kind="int4", group_size=-1, symmetric=False), attention=True
            )
        },
        {"correct": False},
    ],
    ids=["dense attention", "8 bits", "asymmetric", "without correction"],
)
def test_the_weights_of_whole_shards_give_the_same_tokens(made, tmp_path, options):
    source, _, _ = made
    calls = iter([False, True])
    with pytest.raises(InterruptedRunError):
        run(source, tmp_path / "out", interrupted=lambda: next(calls), **options)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "whole.partial")
    run(source, tmp_path / "whole", resumed=True, **options)
    flip(tmp_path / "out.partial/tokens-00002.f32")
    run(source, tmp_path / "out", resumed=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_made_again_must_be_the_same(stopped, monkeypatch):
    source, out, _ = stopped
    name = "tokens-00001.f32"
    flip(out.with_name("out.partial") / name)
    monkeypatch.setattr(Activations, "write_final", write_more(Activations.write_final))
    with pytest.raises(
        CheckpointError, match=rf"{name}: .*expected SHA.* made again.* start again"
    ):
        run(source, out, resumed=True)


def write_more(original):
    return lambda self, start, values: original(self, start, values + 1e-3)


@pytest.mark.parametrize(
    "other",
    [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(os.devnull)],
    ids=["a directory", "a pipe", "a link"],
)
def test_what_is_no_file_is_refused_and_left(stopped, other):
    source, out, _ = stopped
    path = out.with_name("out.partial") / SHARDS[0]
    path.unlink()
    other(path)
    with pytest.raises(UsageError, match=f"qmix did not write is in the way; found {path.name}"):
        run(source, out, resumed=True)
    assert os.path.lexists(path)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_shard_that_changes_after_it_was_written_gets_no_manifest(made, tmp_path, shard):
    source, _, _ = made
    damaged = []

    def damage():
        path = tmp_path / "out.partial" / shard
        if path.exists() and not damaged:
            flip(path)
            damaged.append(path)
        return False

    with pytest.raises(CheckpointError, match=rf"{shard}: a file of the interrupted run is dam"):
        run(source, tmp_path / "out", interrupted=damage)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"settings": 3, "results": []}', '{"settings": {}, "results": {}}',
     '{"settings": {}, "settings": {}}', "\0"],
)  # fmt: skip
def test_a_damaged_state_is_named_and_nothing_is_deleted(stopped, text):
    source, out, _ = stopped
    folder = out.with_name("out.partial")
    (folder / STATE).write_text(text)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=STATE) as caught:
        run(source, out, resumed=True)
    assert caught.value.exit_code == 3
    assert contents(folder) == before


def change_state(out, change):
    path = out.with_name("out.partial") / STATE
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("entry", ["settings", "source", "results", "files", "sha256"])
def test_an_edited_state_is_refused(stopped, entry):
    source, out, _ = stopped
    change_state(out, lambda document: document.update({entry: {}}))
    with pytest.raises(CheckpointError, match=rf"{STATE}: the state .* is damaged; expected SHA"):
        run(source, out, resumed=True)


def test_a_state_without_checksums_is_refused_with_a_remedy(stopped):
    source, out, _ = stopped
    change_state(out, lambda document: document.pop("sha256"))
    with pytest.raises(CheckpointError, match=rf"{STATE}: .* kept no checksums.* start again"):
        run(source, out, resumed=True)


def changed_results(results):
    return [
        [[3]],
        [{"name": "x"}],
        [[{"name": "x"}]],
        [*results, *results, *results, *results],
        [[]],
    ]


@pytest.mark.parametrize("case", range(5))
def test_so_are_results_that_are_none(stopped, case):
    source, out, _ = stopped

    def change(document):
        document["results"] = changed_results(document["results"])[case]
        document.update(sealed(document))

    change_state(out, change)
    with pytest.raises(CheckpointError, match=f"{STATE}: not the results of layers"):
        run(source, out, resumed=True)


TENSORS = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",  # of a finished layer
    "model.layers.2.block_sparse_moe.experts.1.w1.weight",  # of one that has not been read
    "model.norm.weight",
]


@pytest.mark.parametrize("name", TENSORS)
def test_another_byte_of_the_source_is_refused_by_file_and_tensor(stopped, name):
    source, out, _ = stopped
    entry = open_checkpoint(source).entry(name)
    flip(entry.file, entry.stop - 2)
    with pytest.raises(UsageError, match=rf"another source: {entry.file.name}: {name}; expected"):
        run(source, out, resumed=True)
    assert not out.exists()


def test_another_tokenizer_is_another_source(stopped):
    source, out, _ = stopped
    (source / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"another source: tokenizer\.model; expected SHA-256"):
        run(source, out, resumed=True)


def test_the_same_source_may_lie_elsewhere_in_other_shards(stopped, tmp_path):
    source, out, expected = stopped
    source.rename(tmp_path / "moved")
    next((tmp_path / "moved").glob("*.safetensors")).rename(tmp_path / "moved/model.safetensors")
    (tmp_path / "moved/model.safetensors.index.json").unlink()
    (tmp_path / "moved").rename(source)  # the manifest names the folder
    run(source, out, resumed=True)
    assert contents(out) == expected


@pytest.mark.parametrize(
    ("number", "soak"), gate_and_soak([(n,) for n in range(12)], [(n,) for n in range(12, 112)])
)
def test_a_flipped_byte_anywhere_never_gives_other_weights(made, tmp_path, counted, number, soak):
    """The byte is that of a shard, the state, the tokens or the source, each as often."""
    chance = random.Random(f"{SEED if soak else 0} {number}")
    source, out, expected = stopped_after(chance.choice([1, 2]), made, tmp_path)
    left = out.with_name("out.partial")
    pattern = ["model-*", STATE, "*.f32", "source"][number % 4]
    files = source.glob("*.safetensors") if pattern == "source" else left.glob(pattern)
    path = chance.choice(sorted(files))
    flip(path, chance.randrange(path.stat().st_size))
    other_weights = False
    try:
        run(source, out, resumed=True)
    except QmixError as error:
        counted(cases=1, refused=1)
        assert path.name in str(error)  # noqa: PT017 - either is right
        assert not out.exists()
    else:
        other_weights = contents(out) != expected
        counted(cases=1, made_again=1, other_weights_made=other_weights)
    assert not other_weights
