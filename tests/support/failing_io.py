"""Every call of one kind that a command makes on its files fails once; run under fail_io.c.

    LD_PRELOAD=fail_io.so python -m tests.support.failing_io ROOT COMMAND ERRNO EVERY KIND...

Prints one JSON line for each kind: how many calls there were and were tried, and what went wrong.
A process is forked for each call, so that the imports are paid for once.
"""

import ctypes
import json
import os
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import torch

from qmix.commands.checkpoint.convert import convert_checkpoint
from qmix.commands.checkpoint.export import export_checkpoint
from qmix.errors import QmixError
from qmix.formats.files import manifest
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.streaming import quantize_streaming
from qmix.weights.scheme import NF4, Recipe
from tests.support import packers, raw_mistral
from tests.support.models import small_model

LOST = 99  # exit code of a foreign exception
SHARD_BYTES = 60_000


def quantize(source, out, force=False):
    recipe = Recipe.uniform(NF4, attention=True)
    quantize_streaming(source, out, recipe, method="nf4", shard_bytes=SHARD_BYTES, force=force)


def replace(source, out):
    quantize(source, out, force=True)


def convert(source, out):
    convert_checkpoint(source, out, shard_bytes=SHARD_BYTES)


def export(source, out):
    export_checkpoint(source, out, "compressed-tensors", shard_bytes=SHARD_BYTES)


def save(source, out):
    MixtralForCausalLM.from_pretrained(source, device="cpu").save_pretrained(out)


def prepare(root, command):
    """The source of a command, its output's place, and what no command may touch."""
    source, out = root / "source", root / "out"
    (root / "foreign.json").write_text("mine")
    if command == "convert":
        raw_mistral.write(source, small_model(num_hidden_layers=1).bfloat16(), layout="safetensors")
    elif command == "export":
        source.mkdir()
        packers.write(source, "gptq")
    else:
        small_model(num_hidden_layers=1).to(torch.bfloat16).save_pretrained(source)
    if command == "replace":
        quantize(source, out)
    if command == "save":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    return source, out


def forked(function):
    """Call a function in a process of its own: its exit code, and what it wrote to stderr."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        code, said = 0, ""
        try:
            function()
        except QmixError as error:
            code, said = error.exit_code, str(error)
        except BaseException:  # noqa: BLE001 - the oracle: nothing else may come out
            code, said = LOST, traceback.format_exc()
        os.write(writer, said.encode()[-4000:])
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def wrong(root, out, command, code, said):
    """What an attempt did that it must not do, or None."""
    if code not in (0, 3, 4):
        return f"exit code {code}: {said}"
    if code and (str(root) not in said or "found" not in said):
        return f"the error names no file or no reason: {said}"
    if (root / "foreign.json").read_text() != "mine":
        return "a foreign file was touched"
    if command == "save":
        if (out / "thesis.txt").read_text() != "mine":
            return "a foreign file was touched"
        if (out / "config.json").exists() and code and "stands" not in said:
            return f"half an output under its final name: {said}"
    elif out.exists() and not manifest.is_complete(out):
        return f"half an output under its final name: {names(out)}"
    elif out.exists() and code and command != "replace" and "stands" not in said:
        return f"OUT is there, and the error does not say so: {said}"
    elif command == "replace" and not out.exists() and not list(root.glob(".qmix-replaced-*/out")):
        return f"neither the old output nor the new one is there: {said}"
    return None


def sweep(root, command, kind, number, every):
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    run = globals()[command]
    original = root / "original"
    work = root / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(original, work)
    counter = root / "count"

    def counted():
        shim.fail_io_set(kind.encode(), 0, 0, str(work).encode())
        run(work / "source", work / "out")
        counter.write_text(str(shim.fail_io_count()))

    code, said = forked(counted)
    assert code == 0, said
    expected, calls, tried, problems = names(work), int(counter.read_text()), 0, []
    for at in range(1, calls + 1, every):
        shutil.rmtree(work)
        shutil.copytree(original, work)
        tried += 1

        def failing(at=at):
            shim.fail_io_set(kind.encode(), at, number, str(work).encode())
            run(work / "source", work / "out")

        code, said = forked(failing)
        problem = wrong(work, work / "out", command, code, said)
        if problem is None and code and "stands" not in said:  # the next run repairs everything
            again, said = forked(lambda: run(work / "source", work / "out"))
            if again or names(work) != expected:
                problem = f"the rerun: exit code {again}, {names(work)}: {said}"
        if problem is not None:
            problems.append(f"{kind} {at} of {calls}: {problem}")
    return {"kind": kind, "calls": calls, "tried": tried, "problems": problems}


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    root, command, number, every, *kinds = sys.argv[1:]
    original = Path(root, "original")
    original.mkdir()
    prepare(original, command)
    for kind in kinds:
        print(json.dumps(sweep(Path(root), command, kind, int(number), int(every))), flush=True)


if __name__ == "__main__":
    main()
