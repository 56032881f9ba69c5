"""Opening Mistral's own checkpoints: where each weight of Hugging Face's lies in the raw files.

There are two layouts, with stacked or with single experts; the tensors' names tell which it is.
Knows nothing of output. Shape letters: see qmix.kernels.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError
from qmix.files import file_names, regular_file
from qmix.formats import names
from qmix.formats.files import pickles, shards
from qmix.formats.files.shards import Entry, Shards
from qmix.formats.mistral import params
from qmix.formats.mistral.detect import raw_files
from qmix.formats.mistral.params import PARAMS
from qmix.formats.names import ModelTensor
from qmix.formats.rotary_rows import half_split
from qmix.formats.tensor_errors import check_count, wrong_shape, wrong_tensors

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Part of Hugging Face's name -> Mistral's.
_SPELLINGS = (
    (re.compile(r"^model\.embed_tokens\."), "tok_embeddings."),
    (re.compile(r"^lm_head\."), "output."),
    (re.compile(r"^model\."), ""),
    (re.compile(r"\.input_layernorm\."), ".attention_norm."),
    (re.compile(r"\.post_attention_layernorm\."), ".ffn_norm."),
    (re.compile(r"\.self_attn\.([qkvo])_proj\."), r".attention.w\1."),
)
_SINGLE_EXPERTS = (re.compile(r"\.block_sparse_moe\."), ".feed_forward.")
_STACKED_EXPERTS = (re.compile(r"\.experts\.\d+\.(w[123])\.weight$"), r".\1")
_EXPERT = re.compile(r"\.experts\.(\d+)\.(w[123])\.weight$")


@dataclass(frozen=True)
class Place:
    """Where a weight lies in the raw files, and in which form.

    Attributes:
        name, shape: of the raw tensor.
        rows: those of the weight, [start, stop).
        transposed: the rows are the weight's transpose (w2 of a stack).
        heads: how many, if the rows are interleaved for rotary embeddings; else 0.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    transposed: bool = False
    heads: int = 0


@dataclass(frozen=True)
class RawCheckpoint:
    """An opened raw folder whose tensors are exactly those of the model.

    Attributes:
        config: from params.json, or from the config.json that replaces it.
        ignored: entries of params.json that have no place in the config.
        shards: the files.
        tensors: what the model needs, in the model's order.
        places: where each weight lies, by its canonical name.
    """

    config: MixtralConfig
    ignored: tuple[str, ...]
    shards: Shards
    tensors: tuple[ModelTensor, ...]
    places: Mapping[str, Place]

    def entry(self, tensor: ModelTensor) -> Entry:
        """Where one weight lies: a run of rows, because all layouts stack along the first axis."""
        place = self.places[tensor.name]
        return self.shards.entries[place.name].rows(*place.rows)

    def read(self, tensor: ModelTensor) -> Tensor:
        """Read one weight in the form in which Hugging Face stores it."""
        place = self.places[tensor.name]
        data = shards.read_entry(place.name, self.entry(tensor))
        if place.heads:
            return half_split(data, place.heads)
        return data.t().contiguous() if place.transposed else data


def open_raw(directory: str | Path) -> RawCheckpoint:
    """Open a raw folder and check its tensors against its params.json, before any data are read.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing, left over, in two files, or of a
            wrong shape or dtype; the first five are named.
        UnsupportedError: a pickle that is too old.
    """
    folder = Path(directory)
    entries = _entries(folder)
    config, ignored = _read_config(folder)
    stacked = not any(".feed_forward." in name for name in entries)
    per_layer = 10 if stacked else 7 + 3 * config.num_local_experts
    count = 3 + config.num_hidden_layers * per_layer
    check_count(str(folder), count, len(entries), description=PARAMS)
    tensors = tuple(names.model_tensors(config))
    places = {tensor.name: _place(tensor, config, stacked=stacked) for tensor in tensors}
    raw = RawCheckpoint(config, ignored, Shards(folder, entries), tensors, places)
    _check_tensors(raw)
    return raw


def _entries(folder: Path) -> dict[str, Entry]:
    regular_file.checked_folder(folder)
    files = raw_files(folder)
    if not files:
        converted = (folder / "config.json").is_file() and bool(
            file_names.visible(folder, "*.safetensors")
        )
        others = ", ".join(path.name for path in file_names.visible(folder, "consolidated*")[:5])
        raise CheckpointError(
            "no raw Mistral files",
            where=str(folder),
            expected=f"consolidated.00.pt, .pth or consolidated.safetensors, with {PARAMS}",
            found="a Hugging Face checkpoint" if converted else others or None,
            remedy="Use it as it is: it needs no conversion." if converted else None,
        )
    entries: dict[str, Entry] = {}
    for path in files:
        file_names.existing(folder, path.name)
        read = shards.read_entries if path.suffix == ".safetensors" else pickles.read_entries
        for name, entry in read(path).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor {name} is in two files",
                    where=str(folder),
                    found=f"{entries[name].file.name} and {path.name}",
                    remedy="Keep the files of one download only.",
                )
            entries[name] = entry
    return entries


def _read_config(folder: Path) -> tuple[MixtralConfig, tuple[str, ...]]:
    if (folder / PARAMS).exists():
        return params.read(folder / PARAMS)
    # The hub's repository holds Mistral's pickles beside config.json, without params.json.
    if (folder / "config.json").exists():
        return MixtralConfig.from_pretrained(folder).replace(quantization_config=None), ()
    raise CheckpointError(
        "no such file",
        where=str(folder / PARAMS),
        remedy=f"Put the model's {PARAMS}, or its config.json, beside the weights.",
    )


def _place(tensor: ModelTensor, config: MixtralConfig, *, stacked: bool) -> Place:
    name = tensor.name
    for pattern, spelling in (*_SPELLINGS, _STACKED_EXPERTS if stacked else _SINGLE_EXPERTS):
        name = pattern.sub(spelling, name)
    expert = _EXPERT.search(tensor.name)
    if stacked and expert is not None:
        count, intermediate = config.num_local_experts, config.intermediate_size
        first = int(expert[1]) * intermediate
        return Place(
            name=name,
            shape=(count * intermediate, config.hidden_size),
            rows=(first, first + intermediate),
            transposed=expert[2] == "w2",
        )
    heads = 0
    if tensor.name.endswith(".q_proj.weight"):
        heads = config.num_attention_heads
    elif tensor.name.endswith(".k_proj.weight"):
        heads = config.num_key_value_heads
    return Place(name=name, shape=tensor.shape, rows=(0, tensor.shape[0]), heads=heads)


def _check_tensors(raw: RawCheckpoint) -> None:
    """Raise unless every raw tensor is used, and none is missing."""
    entries = raw.shards.entries
    needed = {place.name: place.shape for place in raw.places.values()}
    missing = [name for name in needed if name not in entries]
    left_over = sorted(entries.keys() - needed.keys())
    for name, shape in needed.items():
        entry = entries.get(name)
        if entry is None:
            continue
        if entry.shape != shape:
            raise wrong_shape(str(entry.file), name, shape, entry.shape, description=PARAMS)
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {name}: wrong dtype",
                where=str(entry.file),
                expected="float32, float16 or bfloat16",
                found=str(entry.dtype).removeprefix("torch."),
            )
    if missing or left_over:
        where = str(raw.shards.directory)
        raise wrong_tensors(where, raw.config, missing, left_over, description=PARAMS)
