"""The file that a page or a picture becomes: refused before the work, written whole at its end.

Knows nothing of what is drawn.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from qmix.errors import UsageError
from qmix.files import atomic_file, regular_file
from qmix.pages import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, PICTURES = ".html", (".svg", ".png")
ANY = (PAGE, *PICTURES)


def check(path: Path, suffixes: tuple[str, ...], *, force: bool, where: str = "--out") -> None:
    """Refuse a name under which the file could not be written, before anything is computed.

    Args:
        suffixes: of the files that the command writes.
        force: an existing file may be replaced.

    Raises:
        UsageError: another suffix, no such folder, or something stands there.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            "not a name of the files that are written",
            where=where,
            expected=" or ".join(f"NAME{suffix}" for suffix in suffixes),
            found=path,
        )
    if not regular_file.is_folder(path.parent):
        raise UsageError("no such folder", where=where, found=path.parent)
    if regular_file.is_folder(path):
        raise UsageError("a folder has this name", where=where, found=path)
    if regular_file.exists(path) and not force:
        raise UsageError(
            "the file exists", where=str(path), remedy="Choose another name, or give --force."
        )


def write_picture(path: Path, figure: "Figure", alt: str) -> None:
    """Write a figure as its name says: SVG or PNG.

    Raises:
        WriteError: the file cannot be written.
    """
    drawn = svg.png(figure) if path.suffix.lower() == ".png" else svg.standalone(figure, alt)
    atomic_file.write(path, drawn)
