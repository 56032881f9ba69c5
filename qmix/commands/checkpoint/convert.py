"""From Mistral's own checkpoint to Hugging Face's, tensor by tensor and without rounding.

Holds one tensor at a time (a transposed one twice). Knows the raw layouts only by formats.mistral.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import qmix
from qmix import strict_json
from qmix.commands.checkpoint import Progress
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError
from qmix.files.file_names import visible
from qmix.formats.files import manifest, output_dir
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.files.shard_writer import write_shards
from qmix.formats.files.shards import check_finite
from qmix.formats.mistral import checkpoint
from qmix.formats.mistral.checkpoint import RawCheckpoint
from qmix.formats.names import ModelTensor
from qmix.formats.tensor_spec import TensorSpec
from qmix.hub.local import shown_name
from qmix.planning import budget
from qmix.planning.plan import check_memory
from qmix.text.sentencepiece_file import MODEL_FILE, read_model
from qmix.text.tokenizer import LlamaTokenizer

# What LlamaTokenizer cannot find in tokenizer.model; the values are those of the hub's Mixtral.
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
        dtype: of the stored weights.
        tokenizer: the file that became tokenizer.model; None if there was none.
        ignored: entries of params.json that have no place in config.json.
    """

    tensors: int
    parameters: int
    bytes_out: int
    seconds: float
    dtype: str
    tokenizer: str | None
    ignored: tuple[str, ...]


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Conversion:
    """Convert a folder of `consolidated.*` files into a Hugging Face checkpoint directory.

    Args:
        source, out: directories; `out` appears complete or not at all.
        shard_bytes: upper limit of an output file.
        force: replace an existing checkpoint at `out`.
        progress: called with the name of the next tensor, the bytes done and all bytes.

    Raises:
        UsageError: a path is unsuitable.
        CheckpointError: the source is damaged, is not a Mixtral, or holds NaN.
        UnsupportedError: a pickle that is too old.
        ResourceError: too little disk space or memory.
    """
    begun = time.perf_counter()
    output_dir.check_paths(source, out, force=force)
    raw = checkpoint.open_raw(source)
    tokenizer = _tokenizer(source, raw.config.vocab_size)
    specs = [
        TensorSpec(tensor.name, raw.entry(tensor).dtype, tensor.shape) for tensor in raw.tensors
    ]
    total = sum(spec.nbytes for spec in specs)
    output_dir.check_space(out, total)
    check_memory(budget.for_rewriting(max(spec.nbytes for spec in specs)))
    dtype = str(specs[0].dtype).removeprefix("torch.")
    with output_dir.partial(out, force=force) as folder:
        tensors = _converted(raw, specs, progress)
        write_shards(folder, [(spec,) for spec in specs], tensors, shard_bytes)
        progress("checksums", total, total)
        _write_configs(folder, raw.config.replace(dtype=dtype))
        if tokenizer is not None:
            tokenizer[1].save_pretrained(folder)
        facts = {"qmix": qmix.__version__, "method": "convert", "source": shown_name(source)}
        manifest.write_manifest(folder, facts)
        bytes_out = output_dir.total_bytes(folder)
    return Conversion(
        tensors=len(specs),
        parameters=sum(spec.nbytes // spec.dtype.itemsize for spec in specs),
        bytes_out=bytes_out,
        seconds=time.perf_counter() - begun,
        dtype=dtype,
        tokenizer=tokenizer[0] if tokenizer is not None else None,
        ignored=raw.ignored,
    )


def _converted(
    raw: RawCheckpoint, specs: Sequence[TensorSpec], progress: Progress
) -> Iterator[dict[str, Tensor]]:
    done, total = 0, sum(spec.nbytes for spec in specs)
    for spec, tensor in zip(specs, raw.tensors, strict=True):
        progress(tensor.name, done, total)
        done += spec.nbytes
        yield {tensor.name: _read_finite(raw, tensor)}


def _read_finite(raw: RawCheckpoint, tensor: ModelTensor) -> Tensor:
    data = raw.read(tensor)
    stored_name = raw.places[tensor.name].name
    check_finite(f"{tensor.name} ({stored_name})", raw.entry(tensor).file, data)
    return data


def _write_configs(folder: Path, config: MixtralConfig) -> None:
    config.save_pretrained(folder)
    ends = list(config.eos_token_ids)
    document = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    strict_json.write(folder / "generation_config.json", document)


def _tokenizer(folder: Path, vocab_size: int) -> tuple[str, LlamaTokenizer] | None:
    """The name of the tokenizer file that has the model's vocabulary, and the tokenizer.

    Mistral's folders hold tokenizer.model, or tokenizer.model.v1 to .v3. If several fit, the plain
    name is preferred, then the newest version.
    """
    versions = visible(folder, f"{MODEL_FILE}.v*")[::-1]
    others = []
    for path in (folder / MODEL_FILE, *versions):
        if not path.exists():
            continue
        tokenizer = LlamaTokenizer(read_model(path), _TOKENIZER_CONFIG, where=str(path))
        if tokenizer.vocab_size == vocab_size:
            return path.name, tokenizer
        others.append(f"{tokenizer.vocab_size} in {path.name}")
    if not others:
        return None
    raise CheckpointError(
        "no tokenizer with the model's vocabulary",
        where=str(folder),
        expected=f"{vocab_size} tokens",
        found=", ".join(others[:5]),
        remedy="Put the model's own tokenizer there, or remove the other to convert without one.",
    )
