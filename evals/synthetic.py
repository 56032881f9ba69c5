"""Mixtral checkpoints of the real widths with seeded weights, to test memory and speed offline.

`python -m qmix.evals.synthetic OUT --layers N [--model 8x22B] [--packed nf4] [--seed S]`. The
weights are Gaussian with outlier channels, so sizes, statistics and times are realistic; the text
of such a model is noise. Shape letters: N outputs, K inputs. Knows nothing of what the checkpoint
is for.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.evals.command import exit_code
from qmix.evals.training.tiny_model import TINY
from qmix.formats.files import manifest, output_dir, shard_writer
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.layouts import bnb
from qmix.formats.names import ModelTensor, model_tensors
from qmix.quantize.output_checkpoint import planned_tensors
from qmix.text.tokenizer import LlamaTokenizer
from qmix.weights import nf4
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import NESTED_BLOCK, Recipe
from qmix.weights.scheme import NF4 as NF4_SCHEME
from qmix.weights.table import Table

# One input channel in 256 is eight times as strong, as in trained transformers
# (https://arxiv.org/abs/2208.07339, section 3).
_OUTLIER_EVERY, _OUTLIER_FACTOR = 256, 8.0
Model = Literal["8x7B", "8x22B"]

# What their config.json have besides the defaults: https://huggingface.co/mistralai/Mixtral-8x22B-v0.1
_MODELS: Mapping[Model, Mapping[str, int]] = {
    "8x7B": {"max_position_embeddings": 32768},
    "8x22B": {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
        "max_position_embeddings": 65536,
    },
}


def config(layers: int, *, packed: bool, model: Model = "8x7B") -> MixtralConfig:
    """A released Mixtral's configuration with `layers` layers."""
    quantization = bnb.quantization_config(NF4_SCHEME, torch.bfloat16) if packed else None
    return MixtralConfig.from_dict(
        {
            **_MODELS[model],
            "model_type": "mixtral",
            "num_hidden_layers": layers,
            "dtype": "bfloat16",
            "quantization_config": quantization,
        }
    )


def write_synthetic(
    out: Path, layers: int, *, packed: bool, seed: int, model: Model = "8x7B"
) -> None:
    """Write a checkpoint directory, with one matrix at a time in memory.

    Args:
        model: whose widths it has.
        packed: make random NF4 codes and scales instead of 16-bit weights.

    Raises:
        UsageError: OUT exists. ResourceError: the disk is too small.
    """
    shape = config(layers, packed=packed, model=model)
    recipe = Recipe.uniform(NF4_SCHEME, attention=True) if packed else Recipe(())
    tensors = list(model_tensors(shape))
    groups = [
        planned_tensors(tensor, recipe.scheme_of(tensor.name), torch.bfloat16) for tensor in tensors
    ]
    output_dir.check_paths(TINY, out, force=False)
    output_dir.check_space(out, sum(spec.nbytes for group in groups for spec in group))
    with output_dir.partial(out) as folder:
        shard_writer.write_shards(
            folder, groups, _random_tensors(tensors, recipe, seed), SHARD_BYTES
        )
        (folder / "config.json").write_text(shape.to_json(), encoding="utf-8")
        if (TINY / "tokenizer.model").is_file():
            (folder / "tokenizer.model").write_bytes(
                padded_tokenizer((TINY / "tokenizer.model").read_bytes(), shape.vocab_size)
            )
        manifest.write_manifest(folder, {"synthetic": True, "seed": seed, "layers": layers})


def padded_tokenizer(model: bytes, vocab_size: int) -> bytes:
    """A sentencepiece model with unused pieces appended up to `vocab_size`.

    Appending to a protobuf message extends its repeated field `pieces` (number 1 of ModelProto in
    sentencepiece_model.proto, with piece = 1, score = 2, type = 3 and UNUSED = 5).
    """
    added = bytearray()
    for index in range(LlamaTokenizer(model).vocab_size, vocab_size):
        text = f"<unused{index}>".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x00\x00" + b"\x18\x05"
        added += b"\x0a" + bytes([len(piece)]) + piece
    return model + bytes(added)


def _random_tensors(
    tensors: Sequence[ModelTensor], recipe: Recipe, seed: int
) -> Iterator[dict[str, Tensor]]:
    for index, tensor in enumerate(tensors):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{index + 1}/{len(tensors)} {tensor.name:60}")
            sys.stderr.flush()
        generator = _generator(seed, tensor.name)
        if recipe.scheme_of(tensor.name).kind == "dense":
            yield {tensor.name: _random_dense(tensor, generator)}
        else:
            rows, columns = tensor.shape
            yield bnb.pack(_random_nf4((rows, columns), generator), tensor.prefix)
    if sys.stderr.isatty():
        sys.stderr.write("\n")


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator for each tensor, so that a layer does not depend on the layers before it."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _random_dense(tensor: ModelTensor, generator: torch.Generator) -> Tensor:
    if tensor.kind == "norm":
        return (1 + 0.1 * torch.randn(tensor.shape, generator=generator)).bfloat16()
    std = 1 / math.sqrt(tensor.shape[-1])  # keeps activations of order one through any depth
    data = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, std, generator=generator)
    if tensor.kind in ("attention", "expert"):
        data[:, ::_OUTLIER_EVERY] *= _OUTLIER_FACTOR
    return data


def _random_nf4(shape: tuple[int, int], generator: torch.Generator) -> Table:
    """A random NF4 weight [N, K], made without quantizing.

    By the design of the format all codes are equally likely, and the largest of 64 Gaussians with
    standard deviation s is about 2.4 s.
    """
    count = math.prod(shape)
    blocks = -(-count // 64)
    absmax = 2.4 / math.sqrt(shape[1])
    return Table(
        codes=torch.randint(0, 256, (count // 2,), dtype=torch.uint8, generator=generator),
        scales=NestedScales(
            codes=torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
            outer=torch.full((-(-blocks // NESTED_BLOCK),), 0.3 * absmax),
            map=nf4.dynamic_map(),
            offset=absmax,
        ),
        table=nf4.table(),
        out_shape=shape,
        out_dtype=torch.bfloat16,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.synthetic", description=__doc__)
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--layers", type=int, required=True, help="number of layers")
    parser.add_argument("--model", choices=("8x7B", "8x22B"), default="8x7B", help="its widths")
    parser.add_argument("--packed", choices=("nf4",), help="write 4-bit weights, not bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    options = parser.parse_args(arguments)
    packed = options.packed is not None
    return exit_code(
        "synthetic",
        lambda: write_synthetic(
            options.out, options.layers, packed=packed, seed=options.seed, model=options.model
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
