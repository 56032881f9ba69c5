"""Recognizing a folder of Mistral's own files by their names. Knows no torch and no content."""

from pathlib import Path

from qmix.errors import UnsupportedError
from qmix.files.file_names import visible

_PICKLES = (".pt", ".pth")


def raw_files(folder: Path) -> list[Path]:
    """The weight files of a raw folder: safetensors files if it has any, else pickles."""
    paths = [path for path in visible(folder, "consolidated*") if path.suffix]
    safetensors = [path for path in paths if path.suffix == ".safetensors"]
    return safetensors or [path for path in paths if path.suffix in _PICKLES]


def refuse_raw(directory: str | Path) -> None:
    """Refuse a folder that holds Mistral's own files and none of Hugging Face's.

    Raises:
        UnsupportedError: it is such a folder; the remedy is `qmix convert`.
    """
    folder = Path(directory)
    is_hugging_face = any(not _is_raw(path) for path in visible(folder, "*.safetensors"))
    if raw_files(folder) and not is_hugging_face:
        raise UnsupportedError(
            "a raw Mistral checkpoint",
            where=str(folder),
            expected="config.json and safetensors files of Hugging Face's layout",
            found=", ".join(path.name for path in raw_files(folder)[:5]),
            remedy="Convert it first: qmix convert RAW OUT",
        )


def _is_raw(path: Path) -> bool:
    return path.name.startswith("consolidated")
