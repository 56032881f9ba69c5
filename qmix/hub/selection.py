"""Which files of a repository make up one model: the weights in one layout, and the texts beside.

A repository may hold the same weights several times: as safetensors, as pickles, as Mistral's own
files, as GGUF of several sizes. Decides from names and sizes alone; knows no network.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.files import regular_file
from qmix.files.file_names import visible
from qmix.hub.repo_id import RepoId

# What a caller will read. "raw": a model that may be in Mistral's own files; "weights": a model,
# with a tokenizer or not; "headers": what describes the weights. The others are of no weights.
Need = Literal["model", "raw", "weights", "headers", "tokenizer", "config"]
Layout = Literal["safetensors", "GGUF", "Mistral's own files"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_CONFIG_TEXTS = (
    *("config.json", "generation_config.json", "params.json", "adapter_config.json"),
    *("quant*config.json", "hf_quant_config.json", "*.safetensors.index.json"),
    *("qmix_manifest.json", "qmix_report.json"),
)
_TEXTS = (
    *("*.json", "*.jinja", "tokenizer.model*", "*.tiktoken", "vocab.txt", "merges.txt"),
    *("additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "README.md"),
)
_TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.model.v*", "tekken.json")
_MOST_TEXT_BYTES = 64 << 20
# Weights that are not the model's: Mistral's copy of the same, adapters, what an optimizer keeps,
# and beside GGUF files the weights of eyes (`mmproj`) and statistics (`imatrix`).
_OTHERS = re.compile(
    r"consolidated.*|.*adapter.*|optimizer.*|.*non_lora_trainables.*|.*mmproj.*|.*imatrix.*"
)
_GGUF_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx")


@dataclass(frozen=True)
class Selection:
    """The files of one model by their paths in the repository.

    Attributes:
        layout: None if no weights are needed.
    """

    texts: tuple[str, ...]
    weights: tuple[str, ...] = ()
    layout: Layout | None = None


def is_other(name: str) -> bool:
    """Whether a file with weights is none of the model that it lies beside, by its name."""
    return _OTHERS.match(name) is not None


def choose(repo: RepoId, sizes: Mapping[str, int], need: Need) -> Selection:
    """The files to fetch.

    Args:
        sizes: bytes of each file of the repository, by path.
        need: "raw" allows Mistral's own files, which only `qmix convert` reads.

    Raises:
        CheckpointError: it holds no weights, or several models.
        UnsupportedError: its weights are in no layout that is read.
    """
    texts = _texts(sizes, _CONFIG_TEXTS if need in ("config", "headers") else _TEXTS)
    plain = [name for name in sizes if "/" not in name and not name.startswith(".")]
    ggufs = [name for name in sizes if name.endswith(".gguf") and not is_other(_base(name))]
    wants_gguf = repo.quant is not None or repo.file is not None
    safetensors = [name for name in plain if name.endswith(".safetensors") and not is_other(name)]
    if need in ("tokenizer", "config") and not (wants_gguf or (ggufs and not safetensors)):
        return Selection(texts)
    if safetensors and not wants_gguf:
        single = [SINGLE] if SINGLE in safetensors and INDEX not in sizes else safetensors
        return Selection(texts, tuple(single), "safetensors")
    if ggufs:
        return Selection(texts, _one_gguf(repo, ggufs, sizes), "GGUF")
    raw = [name for name in plain if name.startswith("consolidated")]
    if raw and need == "raw":
        same = [name for name in raw if name.endswith(".safetensors")]
        return Selection(texts, tuple(same or raw), "Mistral's own files")
    raise _nothing(repo, sizes, raw)


def listed_shards(folder: Path, selection: Selection) -> tuple[str, ...]:
    """The weights that a folder's index lists; all that were selected, if it has none.

    Raises:
        CheckpointError: the index is damaged, or lists what the repository does not hold.
    """
    if selection.layout != "safetensors" or not regular_file.exists(folder / INDEX):
        return selection.weights
    listed = _listed(folder)
    if missing := sorted(listed - set(selection.weights)):
        raise CheckpointError(
            "the index lists shards that the repository does not hold",
            where=str(folder / INDEX),
            found=", ".join(missing[:5]),
        )
    return tuple(sorted(listed))


def is_complete(folder: Path, need: Need, repo: RepoId) -> bool:
    """Whether a snapshot holds all that is needed, as far as its own files tell."""
    wants_gguf = repo.quant is not None or repo.file is not None
    if wants_gguf or not visible(folder, "*.safetensors"):
        ggufs = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
        if ggufs or wants_gguf:
            return _has_gguf(repo, ggufs, folder)
    tokenizer = any(visible(folder, pattern) for pattern in _TOKENIZERS)
    if need == "tokenizer":
        return tokenizer
    config = regular_file.exists(folder / "config.json")
    if need == "config":
        return config
    if need == "weights" and visible(folder, "consolidated*") and not config:
        return True  # nothing tells how many there should be
    return config and _has_weights(folder) and (need == "weights" or tokenizer)


def model_path(folder: Path) -> Path:
    """What to read of a snapshot: the folder, or its first GGUF file if it is of those."""
    if visible(folder, "*.safetensors"):
        return folder
    return next(iter(sorted(folder.rglob("*.gguf"))), folder)


def gguf_path(folder: Path, repo: RepoId) -> Path | None:
    """The first file of the GGUF model that is meant in a snapshot; None if it is no such model."""
    wants_gguf = repo.quant is not None or repo.file is not None
    if visible(folder, "*.safetensors") and not wants_gguf:
        return None
    ggufs = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    return folder / _one_gguf(repo, ggufs, {})[0] if ggufs else None


def _texts(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    sizes = names if isinstance(names, Mapping) else {}
    return tuple(
        name
        for name in sorted(names)
        if any(fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns)
        and sizes.get(name, 0) <= _MOST_TEXT_BYTES
    )


def _listed(folder: Path) -> set[str]:
    index = strict_json.read(folder / INDEX, limit_bytes=strict_json.INDEX_BYTES)
    weight_map = index.get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return {name for name in names if isinstance(name, str)}


def _has_weights(folder: Path) -> bool:
    if regular_file.exists(folder / INDEX):
        return all(regular_file.exists(folder / name) for name in _listed(folder))
    names = [path.name for path in visible(folder, "*.safetensors") if not is_other(path.name)]
    return SINGLE in names or len(names) == 1  # several need the index


def _has_gguf(repo: RepoId, ggufs: list[str], folder: Path) -> bool:
    try:
        files = _one_gguf(repo, ggufs, {})
    except QmixError:
        return False
    match = _GGUF_SHARD.fullmatch(files[0])
    count = 1 if match is None else int(match[3])
    return len(files) == count and all(regular_file.exists(folder / name) for name in files)


def _one_gguf(repo: RepoId, ggufs: list[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The files of the one GGUF model that is meant, the first shard first."""
    models: dict[str, list[str]] = {}
    for name in sorted(ggufs):
        match = _GGUF_SHARD.fullmatch(name)
        models.setdefault(name if match is None else match[1], []).append(name)
    meant = {stem: names for stem, names in models.items() if _is_meant(repo, stem, names)}
    if len(meant) == 1:
        return tuple(*meant.values())
    shown = [
        f"{names[0]} ({sum(sizes.get(name, 0) for name in names) / 1e9:.1f} GB)"
        for names in (meant or models).values()
    ]
    raise CheckpointError(
        "several GGUF models in one repository" if meant else "no such GGUF model",
        where=str(repo),
        expected="one of them",
        found=", ".join(shown[:12]) or None,
        remedy=f"Name it: {repo.name}:Q4_K_M, or {repo.name}/FILE.gguf",
    )


def _is_meant(repo: RepoId, stem: str, names: list[str]) -> bool:
    if repo.file is not None:
        return repo.file in names
    if repo.quant is None:
        return True
    words = re.split(r"[.-]", _base(stem).removesuffix(".gguf").lower())
    return repo.quant.lower() in words


def _base(name: str) -> str:
    return PurePosixPath(name).name


def _nothing(repo: RepoId, sizes: Mapping[str, int], raw: list[str]) -> QmixError:
    """The error for a repository without weights that can be read."""
    if raw:
        return UnsupportedError(
            "a repository of Mistral's own files only",
            where=str(repo),
            found=", ".join(sorted(raw)[:5]),
            remedy=f"Convert it first: qmix convert {repo} OUT",
        )
    if "adapter_config.json" in sizes:
        return CheckpointError(
            "a LoRA adapter, and not a model",
            where=str(repo),
            remedy=f"Download it, and merge it while quantizing: hf download {repo.name} "
            "--local-dir DIR; qmix quantize BASE OUT --adapter DIR",
        )
    if pickles := sorted(name for name in sizes if name.endswith(_PICKLES)):
        return UnsupportedError(
            "no safetensors files",
            where=str(repo),
            found=", ".join(pickles[:5]),
            remedy="qmix never unpickles: look for a version in safetensors, or a branch refs/pr/N.",
        )
    return CheckpointError(
        "a repository without weights",
        where=str(repo),
        expected="safetensors or GGUF files",
        found=", ".join(sorted(sizes)[:5]) or "nothing",
    )
