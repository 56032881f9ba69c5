"""Whole loads of damaged checkpoints: refused by name, or what other libraries read in the files.

One file of a folder is damaged, and the folder loaded: model, tokenizer, logits, three tokens. It
is refused with a QmixError, or it gives the logits of the undamaged checkpoint. Other logits come
only of other weights, settings or pieces that are valid ones and that nothing in the folder
contradicts: then a clean folder with the tensors that the safetensors library (or torch.load) reads
gives the same logits, and `verify` finds the damage wherever a manifest lists the file.
"""

import shutil
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

import qmix
from qmix.commands.checkpoint.convert import convert_checkpoint
from qmix.commands.checkpoint.export import export_checkpoint
from qmix.commands.checkpoint.verify import verify
from qmix.errors import QmixError
from qmix.formats.files.manifest import MANIFEST, read_manifest
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from qmix.quantize.streaming import quantize_streaming
from qmix.weights.scheme import NF4, Recipe, Scheme
from tests.support import damaged_folders, packers, raw_mistral
from tests.support.models import TINY, load_in_tiers, small_model
from tests.support.mutation import generator
from tests.support.soak import SEED, gate_and_soak, tries

IDS = torch.tensor([[1, 5, 6], [0, 1, 7]])
MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])
TEXT = "hi there, \U0001f680 ü"
SLOW_S = 10  # of this process, or of a clock on the wall if others leave it a sixtieth
BUSY = 60
PARTS = 25
SHARD_BYTES = 150_000
DOCUMENTS = ("tokenizer.model", "tokenizer_config.json", "generation_config.json")
INDEX = "model.safetensors.index.json"
RAW = ("raw", "pickles")
# Those of which half of the experts stay in the file until a token needs them.
OFFLOADED = {"dense in part": "dense", "gptq in part": "gptq", "nf4 in part": "nf4"}
LAYOUTS = ("dense", "nf4", "gptq", "compressed", "awq", "pytorch", *RAW, *OFFLOADED)
TRIES = {False: 4, True: 40}  # in the suite, in one test of a soak

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each layout."""
    base = tmp_path_factory.mktemp("whole")
    model = small_model(
        vocab_size=2048, num_hidden_layers=1, num_local_experts=4, eos_token_id=2
    ).to(torch.bfloat16)
    model.save_pretrained(base / "dense", max_shard_bytes=SHARD_BYTES)
    for name in DOCUMENTS:
        shutil.copy(TINY / name, base / "dense")
    schemes = {"nf4": NF4, "rtn": Scheme(kind="int4", group_size=32)}
    for method, scheme in schemes.items():
        recipe = Recipe.uniform(scheme, attention=True)
        options = {"method": method, "shard_bytes": SHARD_BYTES}
        quantize_streaming(base / "dense", base / method, recipe, **options)
    (base / "rtn").rename(base / "gptq")
    export_checkpoint(base / "gptq", base / "compressed", "compressed-tensors")
    packers.checkpoint(base / "awq", packers.awq, packers.AWQ, symmetric=False)
    for layout, name in {"raw": "safetensors", "pickles": "pth"}.items():
        raw_mistral.write(base / layout, model, layout=name, tokenizer=TINY / "tokenizer.model")
    shutil.copytree(base / "dense", base / "pytorch")
    for path in base.glob("pytorch/*.safetensors*"):
        path.unlink()
    torch.save(model.state_dict(), base / "pytorch" / "pytorch_model.bin")
    return base


@dataclass(frozen=True)
class Loaded:
    """What a folder gives."""

    logits: torch.Tensor
    ids: list[int]
    settings: object


def load(folder: Path, layout: str) -> Loaded:
    """The whole way of a folder, raw ones by way of `convert`."""
    if layout in RAW:
        out = folder.with_name("converted")
        shutil.rmtree(out, ignore_errors=True)
        convert_checkpoint(folder, out)
        folder = out
    ids = []
    if layout in OFFLOADED:
        model = load_in_tiers(folder, "cpu", Tiers(device=0, host=2))
    elif layout == "awq":
        model = MixtralForCausalLM.from_pretrained(folder, device="cpu")
    else:
        model, tokenizer = qmix.load(folder, device="cpu")
        ids = tokenizer(TEXT)["input_ids"]
        tokenizer.decode(ids)
    logits = model(IDS, attention_mask=MASK).logits
    model.generate(IDS, attention_mask=MASK, max_new_tokens=3)
    return Loaded(logits, ids, (model.config, model.dtype))


class Judge:
    """Says of a damaged folder that could be loaded why that is right; else `wrong`."""

    def __init__(self, layout, original):
        self.layout, self.original = layout, original
        self.whole = load(original, layout)
        self.tensors = damaged_folders.tensors(original)

    def verdict(self, folder, damaged, found):
        """ "same", or in what valid way the folder is another one; else what is wrong."""
        self._check_manifest(folder, damaged)
        tensors = damaged_folders.tensors(folder)
        expected = self.whole
        if not damaged_folders.same(tensors, self.tensors):
            clean = load(self._rewritten(folder, tensors), self.layout).logits
            assert torch.equal(clean.view(torch.uint8), found.logits.view(torch.uint8))
            return "other weights"
        if found.ids != expected.ids:
            self._check_ids(folder, found)
            return "other pieces"
        if torch.equal(found.logits, expected.logits):
            return "same"
        assert found.settings != expected.settings, "the same weights give other logits"
        return "other settings"

    def _check_manifest(self, folder, damaged):
        """A damaged file that the manifest lists is found by `verify`."""
        if not (folder / MANIFEST).exists() or damaged == MANIFEST:
            return
        listed, before = read_manifest(folder), self.original / damaged
        now = folder / damaged
        if damaged in listed and not (now.exists() and now.read_bytes() == before.read_bytes()):
            with suppress(QmixError):
                assert verify(folder).problems, f"verify does not find the damage of {damaged}"

    def _check_ids(self, folder, found):
        """Other ids come of another tokenizer.model, or of other settings of it."""
        names = [name for name in ("tokenizer.model", "tokenizer_config.json")
                 if not _equal(folder / name, self.original / name)]  # fmt: skip
        assert names, "the same tokenizer gives other ids"
        if names == ["tokenizer.model"]:
            model = (folder / "tokenizer.model").read_bytes()
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            assert found.ids == [1, *processor.encode(TEXT)]

    def _rewritten(self, folder, tensors):
        """The documents of a folder beside tensors that another library wrote."""
        clean = folder.with_name("clean")
        shutil.rmtree(clean, ignore_errors=True)
        clean.mkdir()
        for path in folder.iterdir():
            if path.suffix in (".json", ".model") and path.name not in (INDEX, MANIFEST):
                shutil.copy(path, clean)
        name = "consolidated.safetensors" if self.layout in RAW else "model.safetensors"
        save_file({name: value.contiguous() for name, value in tensors.items()}, clean / name)
        return clean


def _equal(one, other):
    return one.exists() and one.read_bytes() == other.read_bytes()


@dataclass(frozen=True)
class Attempt:
    """How the load of a damaged folder ended: a verdict, and what is wrong with it, if anything."""

    verdict: str
    problem: str | None = None


def attempt(folder, layout, damaged, judge):
    begun, used = time.monotonic(), time.process_time()
    try:
        found = load(folder, layout)
    except QmixError as error:
        done = Attempt("refused", None if str(error).isprintable() else ascii(str(error)))
    except Exception as error:  # noqa: BLE001 - the oracle: nothing else may come out
        done = Attempt("foreign exceptions", repr(error))
    else:
        done = None
    seconds = time.process_time() - used, (time.monotonic() - begun) / BUSY
    if max(seconds) > SLOW_S:
        return Attempt("slow", f"{seconds[0]:.0f} s")
    try:
        return done or Attempt(judge.verdict(folder, damaged, found))
    except Exception as error:  # noqa: BLE001 - what another library refuses must not load either
        return Attempt("loaded wrong", repr(error)[:500])


@pytest.mark.parametrize(
    ("layout", "part", "soak"),
    gate_and_soak(
        [(layout, 0) for layout in LAYOUTS],
        [(layout, part) for part in range(PARTS) for layout in LAYOUTS],
    ),
)
def test_a_damaged_folder_is_refused_or_is_what_its_files_say(
    folders, tmp_path, counted, layout, part, soak
):
    original = folders / OFFLOADED.get(layout, layout)
    judge = Judge(layout, original) if layout != "pytorch" else None  # never loaded
    wrong = []
    counts = Counter(dict.fromkeys(("foreign exceptions", "slow", "loaded wrong"), 0))
    for number in tries(TRIES[soak]):
        folder = tmp_path / layout / "folder"
        shutil.rmtree(tmp_path / layout, ignore_errors=True)
        shutil.copytree(original, folder)
        seed = (SEED, layout, part, number)
        name, way = damaged_folders.damage(folder, generator(*seed))
        done = attempt(folder, layout, name, judge)
        counts[done.verdict] += 1
        if done.problem or (done.verdict != "refused" and layout == "pytorch"):
            wrong.append((*seed, name, way, done))
        assert not (tmp_path / layout / "ran").exists(), "code of a pickle ran"
    counted(cases=number + 1, **counts)
    assert wrong == []
