"""`qmix pull`, `list` and `rm`: models of the hub on this machine, and what qmix made.

Heavy imports stay inside the functions.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import QmixError, UsageError
from qmix.files import regular_file
from qmix.printable import escaped
from qmix.quantities import gigabytes

Name = Annotated[
    str, typer.Argument(metavar="ORG/NAME", help="A model of the hub.", show_default=False)
]


def pull(name: Name, as_json: options.AsJson = False, yes: options.Yes = False) -> None:
    """Download a model of the hub, or bring the cache up to date.

    Only the files of one layout are fetched: safetensors, config and tokenizer. The folder in the
    cache goes to stdout.

    Examples:
      qmix pull mistralai/Mixtral-8x7B-Instruct-v0.1
      qmix pull ORG/NAME@v1.0
      qmix pull ORG/NAME-GGUF:Q4_K_M
    """
    from qmix.hub.download import fetch
    from qmix.hub.remote import HubOptions
    from qmix.hub.repo_id import RepoId

    repo = RepoId.parse(name)
    if repo is None:
        raise UsageError("not the name of a model on the hub", where=name, expected="ORG/NAME")
    confirm = sources.confirmation(yes=yes)
    folder = fetch(repo, "model", HubOptions(), confirm, newest=True)
    document = {"model": str(repo), "folder": str(folder)}
    terminal.print_result(f"{folder}\n", document, as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A model on this machine.

    Attributes:
        bits: of a weight in the files, on average; None: they are not all there, or not read.
        layout: of the experts, or why there is none.
    """

    name: str
    place: Literal["hub", "folder"]
    nbytes: int
    bits: float | None
    layout: str


def list_models(as_json: options.AsJson = False) -> None:
    """List the models in the hub's cache, and the folders that qmix made.

    Examples:
      qmix list
      qmix list --json
    """
    from qmix.hub import cache
    from qmix.hub.remote import HubOptions

    rows = [
        _listed(str(model), "hub", model.folder, model.nbytes)
        for model in cache.models(HubOptions())
    ]
    for folder in _made_folders():
        with regular_file.reading(folder):
            nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        rows.append(_listed(str(folder), "folder", folder, nbytes))
    document = {"cache": str(HubOptions().cache), "models": [asdict(row) for row in rows]}
    terminal.print_result(_table(rows), document, as_json=as_json)


def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="ORG/NAME of the hub's cache, or a folder that qmix made.",
            show_default=False,
        ),
    ],
    as_json: options.AsJson = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Remove without asking.")] = False,
) -> None:
    """Remove models from the hub's cache, or folders that qmix made.

    Of a folder only what its manifest lists is removed.

    Examples:
      qmix rm ORG/NAME
      qmix rm mixtral-nf4 mixtral-gptq --yes
    """
    freed = [_remove(name, yes=yes) for name in names]
    if as_json:
        terminal.print_json({"removed": names, "freed_bytes": sum(freed)})


def _remove(name: str, *, yes: bool) -> int:
    """Remove one; returns the bytes that this freed."""
    from qmix.formats.files import manifest
    from qmix.hub import cache
    from qmix.hub.remote import HubOptions
    from qmix.hub.repo_id import RepoId

    folder = Path(name)
    repo = None if regular_file.is_folder(folder) else RepoId.parse(name)
    if repo is not None:
        removal = cache.removal_of(repo, HubOptions())
        _ask(", ".join(map(str, removal.models)), removal.freed_bytes, yes=yes)
        removal.run(HubOptions())
        return removal.freed_bytes
    regular_file.checked_folder(folder)
    if foreign := manifest.foreign_names(folder):
        raise UsageError(
            "not a folder that qmix made, or it holds other files too",
            where=name,
            found=", ".join(foreign[:5]),
            remedy="Remove it yourself.",
        )
    with regular_file.reading(folder):
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
    _ask(name, nbytes, yes=yes)
    manifest.remove_listed(folder)
    return nbytes


def _ask(what: str, nbytes: int, *, yes: bool) -> None:
    """Go on, or raise.

    Raises:
        UsageError: there is nobody to ask.
        QmixError: the user wants to keep it.
    """
    terminal.message(f"remove {what}: {gigabytes(nbytes)}")
    if yes:
        return
    if not sources.is_terminal():
        raise UsageError("nobody to ask", where="rm", remedy="--yes removes without asking.")
    if not terminal.asked("Remove?"):
        raise QmixError("nothing was removed", where=what)


def _made_folders() -> Iterable[Path]:
    """The folders that qmix wrote: those it noted, and those below the current directory."""
    from qmix.formats.files.manifest import MANIFEST
    from qmix.hub import made

    here = [path.parent.resolve() for path in Path.cwd().glob(f"*/{MANIFEST}")]
    noted = [folder for folder in made.folders() if regular_file.exists(folder / MANIFEST)]
    return sorted({*here, *noted})


def _listed(name: str, place: Literal["hub", "folder"], folder: Path, nbytes: int) -> Listed:
    from qmix.commands.checkpoint.inspect import inspect
    from qmix.hub.selection import model_path

    try:
        inventory = inspect(model_path(folder))
    except QmixError as error:
        return Listed(name=name, place=place, nbytes=nbytes, bits=None, layout=error.what)
    experts = [group for group in inventory.groups if group.kind == "expert"]
    layout = ", ".join(dict.fromkeys(f"{group.layout} {group.scheme}" for group in experts))
    bits = round(inventory.bits_per_weight, 3)
    return Listed(name=name, place=place, nbytes=nbytes, bits=bits, layout=layout)


def _table(rows: list[Listed]) -> str:
    if not rows:
        return "no models: qmix pull ORG/NAME fetches one, and qmix quantize makes one\n"
    names = terminal.cells([row.name for row in rows])
    lines = [
        f"{name}  {gigabytes(row.nbytes):>9}  "
        f"{'' if row.bits is None else f'{row.bits:.2f} bits':>10}  {escaped(row.layout)}"
        for name, row in zip(names, rows, strict=True)
    ]
    return "\n".join(lines) + "\n"
