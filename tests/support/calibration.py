"""A small checkpoint, windows of ids, and a calibrated run over both."""

import torch
from safetensors.torch import load_file, save_file

from qmix.formats import open_checkpoint
from qmix.formats.files import manifest
from qmix.quantize.calibrated.options import CalibratedOptions, LayerOptions
from qmix.quantize.calibrated.run import quantize_calibrated
from qmix.quantize.calibrated.windows import Calibration
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.quantize.source import open_source
from qmix.weights.scheme import Recipe, Scheme
from tests.support.models import write_dense

INT4 = Scheme(kind="int4", group_size=32)
RECIPE = Recipe.uniform(INT4, attention=True)
QUICK = RoundingOptions(trials=1, refine=1)
WINDOWS, WINDOW, LAYERS, EXPERTS = 4, 32, 2, 4
TEXT = "Perfect is the enemy of good, and a list is not a tuple; see the tutorial. " * 40


def write_source(folder, **changes):
    return write_dense(
        folder, **{"num_hidden_layers": LAYERS, "num_local_experts": EXPERTS, **changes}
    )


def windows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 2048, (WINDOWS, WINDOW), generator=generator)
    return Calibration(ids, f"text {seed}")


def run(source, out, *, recipe=RECIPE, activation_bytes=4 << 30, shard_bytes=1 << 30, **options):
    settings = {"objective": "layer", "rounding": QUICK}  # the loss costs a pass more
    settings |= {
        k: options.pop(k) for k in ("weighting", "correct", "objective", "rounding") if k in options
    }
    return quantize_calibrated(
        open_source(source), out, recipe, options.pop("calibration", windows()),
        CalibratedOptions(
            layer=LayerOptions(**settings),
            activation_bytes=activation_bytes, shard_bytes=shard_bytes,
            dtype=options.pop("dtype", None),
        ),
        **options,
    )  # fmt: skip


def contents(folder):
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != manifest.REPORT
    }


def spoil(source, name, value):
    """Set the last number of a tensor; returns the file."""
    path = open_checkpoint(source).entry(name).file
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    return path
