"""Seeded damage to every document that qmix reads: it is read, or refused as a QmixError, at once.

SOAK_SEED (default 0) chooses the damage. The gate tries a few documents of each kind, a soak many.
"""

import copy
import json
import os
import pickle
import shutil
from collections import Counter
from dataclasses import fields

import pytest
import torch

import qmix
from qmix.commands.checkpoint.inspect import inspect
from qmix.commands.checkpoint.verify import verify
from qmix.commands.plan_text import text
from qmix.commands.planner import PlanRequest, answer
from qmix.config import MixtralConfig
from qmix.evals.routing import trace
from qmix.experts import heat_file
from qmix.formats import open_checkpoint
from qmix.formats.mistral import params
from qmix.generation.config import GenerationConfig
from qmix.planning import machine
from qmix.text.tokenizer import LlamaTokenizer
from qmix.text.tokenizer_config import OVERRIDES
from qmix.weights.scheme import NF4, Scheme
from tests.support import raw_mistral
from tests.support.chat_templates import CHATML
from tests.support.fast_tokenizers import fast
from tests.support.models import ROOT, TINY, quantized, small_model
from tests.support.mutation import generator, mutated_bytes, mutated_text, outcome
from tests.support.promptness import within
from tests.support.soak import SEED, both, tries

IDS = torch.tensor([[1, 5, 6], [0, 1, 7]])
MASK = torch.tensor([[1, 1, 1], [0, 1, 1]])
SECONDS = 1.0  # of this process; a document of a few kilobytes takes milliseconds

MEASURED = machine.Measured(
    key="k", host_read=1e9, disk_read=1e9, device_copy=None, interconnect=None, date="2026-01-01"
)
HEAT = {"format": "qmix-heat", "version": 1, "model": "m", "heat": [0, 1, 1 << 16, 5]}
# Entries that a document may have and ours lack.
MORE = {
    "config.json": (
        *(field.name for field in fields(MixtralConfig)),
        *("attn_implementation", "rope_parameters", "rope_scaling", "torch_dtype", "num_labels"),
        *("num_experts", "id2label", "problem_type", "return_dict", "auto_map"),
    ),
    "generation_config.json": [field.name for field in fields(GenerationConfig)],
    "tokenizer_config.json": (*OVERRIDES, "added_tokens_decoder", "chat_template"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One of each: dense, NF4, Int4 in GPTQ's layout, Mistral's own, and the user's files."""
    base = tmp_path_factory.mktemp("documents")
    dense = small_model(
        vocab_size=2048, num_hidden_layers=1, num_local_experts=2, eos_token_id=2
    ).to(torch.bfloat16)
    dense.save_pretrained(base / "dense")
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, base / "dense")
    (base / "dense" / "added_tokens.json").write_text('{"<pad>": 2048}')
    (base / "fast").mkdir()
    model = (TINY / "tokenizer.model").read_bytes()
    (base / "fast" / "tokenizer.json").write_text(fast(model).to_str())
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (base / "fast" / "special_tokens_map.json").write_text(json.dumps(names))
    (base / "fast" / "chat_template.jinja").write_text(CHATML)
    schemes = {"nf4": NF4, "rtn": Scheme(kind="int4", group_size=32)}
    for method, scheme in schemes.items():
        quantized(base / "dense", base / method, scheme, method=method)
    shutil.copytree(base / "rtn", base / "old")  # before transformers took over the settings
    document = json.loads((base / "old" / "config.json").read_text())
    del document["quantization_config"]
    (base / "old" / "config.json").write_text(json.dumps(document))
    raw_mistral.write(base / "raw", dense, layout="safetensors")
    machine.save(MEASURED, base / "machine.json")
    (base / "heat.json").write_text(json.dumps(HEAT))
    shutil.copy(ROOT / "tests" / "golden" / "tiny.trace", base)
    return base


def read_config(path):
    config = MixtralConfig.from_pretrained(path.parent)
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
    hash(config)
    outcome(lambda: config.num_labels)
    config.save_pretrained(path.parent.parent / "saved")
    generate(path)


def generate(path):
    model, _ = qmix.load(path.parent, device="cpu")
    model.generate(IDS, attention_mask=MASK, max_new_tokens=3, min_new_tokens=2)
    assert model(IDS).logits.isfinite().all()


def tokenize(path):
    tokenizer = LlamaTokenizer.from_pretrained(path.parent)
    batch = tokenizer(["hi there", "\U0001f680 ü"], padding=True, return_tensors="pt")
    tokenizer.batch_decode(batch["input_ids"])
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    tokenizer.decode(range(len(tokenizer)))
    saved = path.parent.parent / f"saved-{path.parent.name}"
    tokenizer.save_pretrained(saved)
    assert len(LlamaTokenizer.from_pretrained(saved)) == len(tokenizer)


def survey(path):
    open_checkpoint(path.parent)
    json.dumps(inspect(path.parent).to_dict())
    text(answer(PlanRequest(source=path.parent)))


def read_measurements(path):
    assert isinstance(machine.measurements("k", path), machine.SavedMeasurements)


READERS = {
    "dense/config.json": read_config,
    "nf4/config.json": survey,
    "rtn/config.json": survey,
    "dense/generation_config.json": generate,
    "dense/tokenizer_config.json": tokenize,
    "dense/added_tokens.json": tokenize,
    "dense/tokenizer.model": tokenize,
    "fast/tokenizer.json": tokenize,
    "fast/special_tokens_map.json": tokenize,
    "fast/chat_template.jinja": tokenize,
    "dense/model.safetensors.index.json": survey,
    "nf4/qmix_manifest.json": lambda path: verify(path.parent),
    "old/quantize_config.json": survey,
    "raw/params.json": params.read,
    "machine.json": read_measurements,
    "heat.json": lambda path: heat_file.read(path, experts=4, model="m"),
    "tiny.trace": trace.read_trace,
}


@both
@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_document_is_read_or_refused(folder, name, counted, soak):
    path = folder / name
    good = path.read_bytes()
    counts = Counter()
    try:
        for number in tries(400 if soak else 12):
            rng = generator(SEED, name, number)
            path.write_bytes(damaged(path, good, rng))
            with within(SECONDS):
                counts[outcome(lambda: READERS[name](path))] += 1
    finally:
        path.write_bytes(good)
    counted(cases=counts.total(), **counts)
    assert counts["refused"] or name.endswith("machine.json")
    assert outcome(lambda: READERS[name](path)) == "read"


def damaged(path, good, rng):
    if path.suffix not in (".json",):
        return mutated_bytes(good, rng)
    return mutated_text(json.loads(good), rng, more=MORE.get(path.name, ()))


@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "dangling link"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_called_what_it_is(folder, name, kind):
    path = folder / name
    kept = path.with_name("kept")
    path.rename(kept)
    try:
        if kind == "directory":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.symlink_to("/nowhere")
        said = refusal(lambda: READERS[name](path))
        if kind != "dangling link" and name not in (*OWN, *OPTIONAL):
            assert kind in said, said
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        kept.rename(path)


OWN = ("machine.json", "heat.json")  # read only if they are a regular file of this user's
# Those that a checkpoint can do without, and a missing index is one of a single file.
OPTIONAL = ("dense/model.safetensors.index.json", "old/quantize_config.json")


def refusal(work):
    try:
        work()
    except qmix.errors.QmixError as error:
        return str(error)
    return ""
