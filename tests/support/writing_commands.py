"""What writes a checkpoint, and two that only read one, on small models: functions of (SRC, OUT).

`prepare` makes what a command starts from. Knows nothing of what is done to them meanwhile.
"""

from contextlib import suppress
from unittest import mock

import torch

import qmix
from qmix.commands.checkpoint.convert import convert_checkpoint
from qmix.commands.checkpoint.export import export_checkpoint
from qmix.commands.checkpoint.verify import verify
from qmix.errors import InterruptedRunError
from qmix.formats.files import replacement
from qmix.formats.mistral.checkpoint import open_raw
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.streaming import quantize_streaming
from qmix.weights.scheme import NF4, Recipe
from tests.support import calibration, packers, raw_mistral
from tests.support.models import small_model

SHARD_BYTES = 60_000
OURS = "thesis.txt"  # a file of the user's in the folder that `save` writes into


def nf4(source, out, force=False):
    recipe = Recipe.uniform(NF4, attention=True)
    quantize_streaming(source, out, recipe, method="nf4", shard_bytes=SHARD_BYTES, force=force)


def rtn(source, out):
    recipe = Recipe.uniform(calibration.INT4, attention=True)
    quantize_streaming(source, out, recipe, method="rtn", shard_bytes=SHARD_BYTES)


def gptq(source, out, interrupted=lambda: False, resumed=True):
    """Goes on with whatever an earlier run left."""
    tokens_in_files = {"activation_bytes": 0}
    calibration.run(source, out, resumed=resumed, interrupted=interrupted, **tokens_in_files)


resume = gptq


def replace(source, out):
    nf4(source, out, force=True)


def replace_by_two_renames(source, out):
    with mock.patch.object(replacement, "_exchanged", return_value=False):
        replace(source, out)


def convert(source, out):
    convert_checkpoint(source, out, shard_bytes=SHARD_BYTES)


convert_pickles = convert


def export(source, out):
    export_checkpoint(source, out, "compressed-tensors", shard_bytes=SHARD_BYTES)


def save(source, out):
    MixtralForCausalLM.from_pretrained(source, device="cpu").save_pretrained(out)


save_anew = save


def load(source, out):
    model, tokenizer = qmix.load(source, device="cpu")
    model(tokenizer("a", return_tensors="pt")["input_ids"])


def check(source, out):
    problems = verify(source).problems
    if problems:
        raise problems[0]


WRITERS = {
    each.__name__: each for each in (nf4, rtn, gptq, replace, replace_by_two_renames, convert)
} | {
    "resume": resume, "convert_pickles": convert_pickles, "export": export, "save": save,
    "save_anew": save_anew,
}  # fmt: skip
READERS = {"load": load, "check": check}
COMMANDS = WRITERS | READERS
REPLACING = ("replace", "replace_by_two_renames")


def prepare(root, command):
    """Write SRC, what a command finds at OUT, and neighbours that no command may touch."""
    source, out = root / "source", root / "out"
    for neighbour in ("foreign.json", "out.json", ".qmix-replaced-mine", "out.partial.writing"):
        (root / neighbour).write_text("mine")
    _write_source(source, command)
    if command in REPLACING:
        rtn(source, out)
    elif command == "resume":
        with suppress(InterruptedRunError):
            gptq(source, out, interrupted=lambda: True)
    elif command == "save":
        out.mkdir()
        (out / OURS).write_text("mine")


def _write_source(source, command):
    small = {"num_hidden_layers": 1, "num_local_experts": 2}
    if command.startswith("convert"):
        layout = "pickles" if command == "convert_pickles" else "safetensors"
        raw_mistral.write(source, small_model(**small).bfloat16(), layout=layout)
        open_raw(source)  # imports a second's worth, once for all processes that are forked
    elif command == "export":
        source.mkdir()
        packers.write(source, "gptq")
    elif command in ("load", "check"):
        calibration.write_source(source.with_name("dense"), **small)
        nf4(source.with_name("dense"), source)
    elif command in ("gptq", "resume"):
        calibration.write_source(source, num_local_experts=2)
    else:
        small_model(**small).to(torch.bfloat16).save_pretrained(source)
