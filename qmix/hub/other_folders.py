"""Folders and files that are given for a checkpoint and are something else: what, and the remedy.

Looks at names, and reads nothing but an adapter's base model. Knows no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError
from qmix.files import regular_file
from qmix.files.file_names import visible

CONFIG = "config.json"
ADAPTER = "adapter_config.json"

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".zst", ".xz", ".bz2", ".7z")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_IN_A_CHECKPOINT = (".json", ".safetensors", ".model", ".jinja", *_PICKLES)


@dataclass(frozen=True)
class Kind:
    """What a folder without a model is.

    Attributes:
        patterns: of names, any of which is in it.
        what: its name, in words.
        remedy: what to give instead.
    """

    patterns: tuple[str, ...]
    what: str
    remedy: str


_TRAINING = Kind(
    ("optimizer.*", "trainer_state.json", "training_args.bin", "rng_state*", "scheduler.pt"),
    "the state of a training, without the model",
    "Save the model with save_pretrained, and give that folder.",
)
_KINDS = (
    Kind(
        ("zero_to_fp32.py", "global_step*", "*zero_pp_rank*"),
        "a DeepSpeed checkpoint",
        "Make safetensors of it: python zero_to_fp32.py . OUT --safe_serialization",
    ),
    Kind(
        ("*.distcp",),
        "a distributed checkpoint of PyTorch (FSDP)",
        "Save the model with save_pretrained, or merge it: accelerate merge-weights.",
    ),
    Kind(
        ("model_index.json",),
        "a diffusers pipeline",
        "qmix runs Mixtral: give a folder of its config.json and safetensors files.",
    ),
    _TRAINING,
    Kind(
        ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
        "a tokenizer without a model",
        "Download the model's config.json and safetensors files into the same folder.",
    ),
)


def of_training(name: str) -> bool:
    """Whether a file is what a training keeps beside the model."""
    return any(fnmatch(name, pattern) for pattern in _TRAINING.patterns)


def check(folder: Path) -> None:
    """Raise if a folder is none of a model and it is clear what it is.

    Raises:
        CheckpointError: as `error`.
    """
    if (found := error(folder)) is not None:
        raise found


def error(folder: Path) -> QmixError | None:
    """The error that names what a folder without a model's files is; None if it is not clear."""
    if regular_file.exists(folder / ADAPTER):
        return _adapter(folder)
    if any(visible(folder, pattern) for pattern in ("*.gguf", "consolidated*", "params.json")):
        return None
    if names := _checkpoints(folder):
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        return _refusal(
            "a folder of checkpoints, and none itself",
            folder,
            f"{', '.join(names[:5])}{more}",
            f"Give one of them, such as {folder / names[-1]}.",
        )
    for kind in _KINDS:
        if found := _matches(folder, kind.patterns):
            return _refusal(kind.what, folder, ", ".join(found[:5]), kind.remedy)
    return None


def check_file(path: Path) -> None:
    """Raise if a file that is given for a checkpoint is a part of one, or is not read.

    Raises:
        CheckpointError: it is such a file.
    """
    folder = path.parent
    if path.suffix in _ARCHIVES:
        raise _refusal("an archive", path, None, "Unpack it, and give the folder.")
    if path.name == ADAPTER or path.name.startswith("adapter_"):
        raise error(folder) or _refusal("a part of an adapter", path, None, "Give a model.")
    if path.suffix != ".gguf" and _begins_with_gguf(path):
        raise _refusal("a GGUF file without its suffix", path, None, f"ln -s {path} NAME.gguf")
    if path.suffix in _IN_A_CHECKPOINT and regular_file.exists(folder / CONFIG):
        raise _refusal("a file of a checkpoint", path, None, f"Give its folder: {folder}")


def _begins_with_gguf(path: Path) -> bool:
    """As ollama keeps them, by the hash of their content."""
    if not path.is_file():
        return False
    with regular_file.open_regular(path) as file:
        return file.read(4) == b"GGUF"


def has_unused_adapter(folder: Path) -> bool:
    """Whether an adapter lies beside a model, where it is not read."""
    return all(regular_file.exists(folder / name) for name in (ADAPTER, CONFIG))


def _adapter(folder: Path) -> QmixError:
    base = strict_json.read(folder / ADAPTER).get("base_model_name_or_path")
    named = base if isinstance(base, str) and base else "BASE"
    return _refusal(
        "a LoRA adapter, and not a model",
        folder,
        f"{ADAPTER}, made for {named}",
        f"Merge it while quantizing: qmix quantize {named} OUT --adapter {folder}",
    )


def _checkpoints(folder: Path) -> list[str]:
    """The names of the folders below that hold a model, the newest of a training last."""
    found = [
        path.name
        for path in visible(folder, "*")
        if regular_file.is_folder(path)
        and (regular_file.exists(path / CONFIG) or visible(path, "*.gguf"))
    ]
    return sorted(found, key=_numbered)


def _numbered(name: str) -> tuple[str, int]:
    """The order of checkpoint-500 and checkpoint-1000."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)


def _matches(folder: Path, patterns: Iterable[str]) -> list[str]:
    return [path.name for pattern in patterns for path in visible(folder, pattern)]


def _refusal(what: str, where: Path, found: str | None, remedy: str) -> CheckpointError:
    return CheckpointError(
        what,
        where=str(where),
        expected="a folder with config.json and safetensors files, or a GGUF file",
        found=found,
        remedy=remedy,
    )
