"""Mistral's own checkpoint in, Hugging Face's out, tensor by tensor and without rounding.

Holds one tensor at a time (a transposed one twice). Knows the raw layouts by `formats.mistral` only.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import qmix
from qmix import strict_json
from qmix.errors import CheckpointError
from qmix.formats.files import output_dir, shards
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.files.shards import Planned
from qmix.formats.mistral import checkpoint
from qmix.formats.mistral.checkpoint import RawCheckpoint
from qmix.formats.names import ModelTensor
from qmix.planning import budget
from qmix.planning.plan import check_memory
from qmix.text.sentencepiece_file import MODEL_FILE, read_model
from qmix.text.tokenizer import LlamaTokenizer

# What Hugging Face's LlamaTokenizer cannot see in tokenizer.model; the values of the hub's Mixtral.
_TOKENIZER_CONFIG = {
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "spaces_between_special_tokens": False,
}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The outcome.

    Attributes:
        tensors, parameters: how many were written.
        bytes_out: of the whole directory.
        dtype: of the weights, as stored.
        tokenizer: the file that became tokenizer.model; None if there was none.
        ignored: entries of params.json that were left aside.
    """

    tensors: int
    parameters: int
    bytes_out: int
    seconds: float
    dtype: str
    tokenizer: str | None
    ignored: tuple[str, ...]


def run(
    source: Path,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Conversion:
    """Convert a folder of `consolidated.*` files into a Hugging Face checkpoint directory.

    Args:
        source, out: directories; `out` appears complete or not at all.
        shard_bytes: upper bound of an output file.
        force: replace an existing checkpoint at `out`.
        progress: called with the tensor's name, the bytes done and all bytes.

    Raises:
        UsageError: the paths are unfit. CheckpointError: the source is damaged, not a Mixtral, or
            holds NaN. UnsupportedError: a pickle too old. ResourceError: the disk is too small.
    """
    begun = time.perf_counter()
    output_dir.check_paths(source, out, force=force)
    raw = checkpoint.open_raw(source)
    tokenizer = _tokenizer(source, raw.config.vocab_size)
    groups = [
        (Planned(tensor.name, raw.entry(tensor).dtype, tensor.shape),) for tensor in raw.tensors
    ]
    total = sum(group[0].nbytes for group in groups)
    output_dir.check_space(out, total)
    check_memory(budget.for_rewriting(max(group[0].nbytes for group in groups)))
    dtype = str(groups[0][0].dtype).removeprefix("torch.")

    def converted() -> Iterator[dict[str, Tensor]]:
        done = 0
        for (planned,), tensor in zip(groups, raw.tensors, strict=True):
            progress(tensor.name, done, total)
            done += planned.nbytes
            yield {tensor.name: _finite(raw, tensor)}

    with output_dir.partial(out, force=force) as folder:
        shards.write_shards(folder, groups, converted(), shard_bytes)
        progress("checksums", total, total)
        config = raw.config.replace(dtype=dtype)
        config.save_pretrained(folder)
        ends = list(config.eos_token_ids)
        strict_json.write(
            folder / "generation_config.json",
            {
                "bos_token_id": config.bos_token_id,
                "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            },
        )
        if tokenizer is not None:
            tokenizer[1].save_pretrained(folder)
        facts = {"qmix": qmix.__version__, "method": "convert", "source": source.resolve().name}
        output_dir.write_manifest(folder, facts)
        bytes_out = sum(path.stat().st_size for path in folder.iterdir())
    return Conversion(
        tensors=len(groups),
        parameters=sum(group[0].nbytes // group[0].dtype.itemsize for group in groups),
        bytes_out=bytes_out,
        seconds=time.perf_counter() - begun,
        dtype=dtype,
        tokenizer=tokenizer[0] if tokenizer is not None else None,
        ignored=raw.ignored,
    )


def _tokenizer(folder: Path, vocab_size: int) -> tuple[str, LlamaTokenizer] | None:
    """The folder's tokenizer with the model's vocabulary, and the name of its file.

    Mistral's folders hold tokenizer.model, or tokenizer.model.v1 to .v3; of two that fit, the plain
    name is taken, then the newest.
    """
    versions = sorted(folder.glob(f"{MODEL_FILE}.v*"), reverse=True)
    found = []
    for path in (folder / MODEL_FILE, *versions):
        if not path.exists():
            continue
        tokenizer = LlamaTokenizer(read_model(path), _TOKENIZER_CONFIG, where=str(path))
        if tokenizer.vocab_size == vocab_size:
            return path.name, tokenizer
        found.append(f"{tokenizer.vocab_size} in {path.name}")
    if not found:
        return None
    raise CheckpointError(
        "no tokenizer with the model's vocabulary",
        where=str(folder),
        expected=f"{vocab_size} tokens",
        found=", ".join(found[:5]),
        remedy="Put the model's own tokenizer there, or remove the other to convert without one.",
    )


def _finite(raw: RawCheckpoint, tensor: ModelTensor) -> Tensor:
    data = raw.read(tensor)
    # The extremes are NaN if any element is: 0.009 s for w1, where isfinite takes 0.4 s.
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(data)):
        raise CheckpointError(
            f"tensor {tensor.name} ({raw.places[tensor.name].name}) holds NaN or infinity",
            where=str(raw.entry(tensor).file),
            remedy="The checkpoint is damaged; download it again.",
        )
    return data
