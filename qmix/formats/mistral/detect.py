"""A folder of Mistral's own files, known by their names. Knows no torch, and not what they hold."""

from pathlib import Path

from qmix.errors import UnsupportedError

PICKLES = (".pt", ".pth")


def raw_files(folder: Path) -> list[Path]:
    """The weight files of a raw folder: safetensors where there are any, else pickles."""
    found = sorted(path for path in folder.glob("consolidated*") if path.suffix)
    preferred = [path for path in found if path.suffix == ".safetensors"]
    return preferred or [path for path in found if path.suffix in PICKLES]


def refuse_raw(directory: str | Path) -> None:
    """Send a folder that holds Mistral's own files, and none of Hugging Face's, to `qmix convert`.

    Raises:
        UnsupportedError: it is one.
    """
    folder = Path(directory)
    others = (path for path in folder.glob("*.safetensors") if not _raw(path))
    if raw_files(folder) and next(others, None) is None:
        raise UnsupportedError(
            "a raw Mistral checkpoint",
            where=str(folder),
            expected="config.json and safetensors files of Hugging Face's layout",
            found=", ".join(path.name for path in raw_files(folder)[:5]),
            remedy="Convert it first: qmix convert RAW OUT",
        )


def _raw(path: Path) -> bool:
    return path.name.startswith("consolidated")
