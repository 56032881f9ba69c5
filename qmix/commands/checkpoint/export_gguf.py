"""A checkpoint as one GGUF file: metadata and tokenizer of llama.cpp, stacks expert by expert.

Holds one weight at a time. The file carries its config and tokenizer inside.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qmix.commands.checkpoint.export_plan import ExportPlan, PlannedWeight
from qmix.commands.checkpoint.export_weights import WeightConversion
from qmix.errors import UnsupportedError
from qmix.formats import Checkpoint
from qmix.formats.files import output_dir
from qmix.formats.gguf.config import described
from qmix.formats.gguf.tensors import gguf_name, rotary_heads
from qmix.formats.layouts import gguf_blocks
from qmix.formats.rotary_rows import neighbours
from qmix.gguf.files import SUFFIX, is_gguf, read_model
from qmix.gguf.header_fields import Value
from qmix.gguf.writer import PlannedTensor, write_gguf
from qmix.text import gguf_vocabulary
from qmix.text.tokenizer import LlamaTokenizer

NAME = "model" + SUFFIX
_TOKENIZER = "tokenizer."
# `general.file_type` by the type of most experts (llama.cpp, include/llama.h, `llama_ftype`); other
# types have none of their own.
_FILE_TYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip


def model_metadata(checkpoint: Checkpoint, source: Path) -> dict[str, Value]:
    """The metadata of the file: config and tokenizer.

    Raises:
        CheckpointError: there is no tokenizer, or it is not the model's.
        UnsupportedError: a model that llama.cpp's architecture "llama" does not compute: another
            activation, or no head for tokens.
    """
    _check_architecture(checkpoint)
    general: dict[str, Value] = {
        "general.name": source.resolve().stem,
        "general.quantization_version": 2,
    }
    return {**described(checkpoint.config), **general, **_tokenizer(checkpoint, source)}


def _check_architecture(checkpoint: Checkpoint) -> None:
    config, where = checkpoint.config, str(checkpoint.shards.directory)
    if config.hidden_act != "silu":
        raise UnsupportedError(
            "llama.cpp computes another activation in a Mixtral",
            where=f"{where}: hidden_act",
            expected="'silu'",
            found=repr(config.hidden_act),
        )
    heads = [tensor.name for tensor in checkpoint.tensors if tensor.kind == "head"]
    if heads != ([] if config.tie_word_embeddings else ["lm_head.weight"]):
        raise UnsupportedError(
            "GGUF holds models with a head for tokens",
            where=where,
            expected="lm_head.weight",
            found=heads[0] if heads else "no head",
        )


def write(
    folder: Path,
    checkpoint: Checkpoint,
    plan: ExportPlan,
    conversion: WeightConversion,
    metadata: Mapping[str, Value],
    show: Callable[[str, int], None],
) -> None:
    """Write NAME into a folder.

    Args:
        metadata: see `model_metadata`.
        show: called with the name of the next weight and the weights done.

    Raises:
        CheckpointError: the source is damaged.
        ResourceError: too little disk space.
    """
    tensors = [_planned(group) for group in plan.groups]
    output_dir.check_space(folder.parent / folder.stem, sum(tensor.nbytes for tensor in tensors))
    data = _data(checkpoint, plan, conversion, show)
    write_gguf(folder / NAME, {**metadata, **_file_type(plan)}, tensors, data)


def _planned(group: Sequence[PlannedWeight]) -> PlannedTensor:
    first = group[0]
    stack = (len(group),) if first.tensor.kind == "expert" else ()
    return PlannedTensor(gguf_name(first.tensor), first.form.type, (*stack, *first.tensor.shape))


def _file_type(plan: ExportPlan) -> dict[str, Value]:
    types = Counter(w.form.type for w in plan.weights if w.tensor.kind == "expert")
    ((common, _),) = types.most_common(1)
    return {"general.file_type": _FILE_TYPES[common]} if common in _FILE_TYPES else {}


def _tokenizer(checkpoint: Checkpoint, source: Path) -> dict[str, Value]:
    """The keys of the tokenizer: as they are if the source is GGUF."""
    if is_gguf(source):
        metadata = read_model(source).metadata
        return {key: value for key, value in metadata.items() if key.startswith(_TOKENIZER)}
    tokenizer, config = LlamaTokenizer.from_pretrained(source), checkpoint.config
    said: dict[str, Value] = gguf_vocabulary.described(tokenizer.vocabulary(), config.vocab_size)
    said["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos_token
    said["tokenizer.ggml.add_eos_token"] = tokenizer.add_eos_token
    ends = config.eos_token_ids
    ids = {"bos": config.bos_token_id, "padding": config.pad_token_id}
    ids.update(zip(("eos", "eot"), ends, strict=False))
    for name, index in ids.items():
        if index is not None and index >= 0:
            said[f"tokenizer.ggml.{name}_token_id"] = index
    return {**said, **gguf_vocabulary.described_templates(tokenizer.chat_templates)}


def _data(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    conversion: WeightConversion,
    show: Callable[[str, int], None],
) -> Iterator[Iterator[memoryview]]:
    """The bytes of each tensor, one expert at a time."""
    done = 0
    for group in plan.groups:
        yield _parts(checkpoint, group, conversion, show, done)
        done += len(group)


def _parts(
    checkpoint: Checkpoint,
    group: Sequence[PlannedWeight],
    conversion: WeightConversion,
    show: Callable[[str, int], None],
    done: int,
) -> Iterator[memoryview]:
    for index, planned in enumerate(group):
        show(planned.tensor.name, done + index)
        data = _rows(checkpoint, planned, conversion)
        yield data.contiguous().view(-1).view(torch.uint8).numpy().data


def _rows(checkpoint: Checkpoint, planned: PlannedWeight, conversion: WeightConversion) -> Tensor:
    """A weight's rows in llama.cpp's order."""
    tensor, kind = planned.tensor, planned.form.type
    if tensor.kind == "norm":
        return checkpoint.read(tensor.name).to(planned.form.dtype)
    if planned.step == "copied":
        packing = checkpoint.packing(tensor)
        assert packing is not None
        return checkpoint.read_stored(packing.names[0])
    rows = gguf_blocks.pack(conversion.weight(planned), kind)
    heads = rotary_heads(tensor.prefix, checkpoint.config)
    return neighbours(rows, heads) if heads else rows
