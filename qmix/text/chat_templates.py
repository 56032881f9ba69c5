"""The chat templates that a checkpoint brings along: where they are kept, and which one is meant.

A template is Jinja text. Knows nothing of rendering.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmix.errors import CheckpointError, QmixError, UsageError
from qmix.files import regular_file

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
TEMPLATE_ENTRY = "chat_template"
DEFAULT = "default"
_TOOLS = "tool_use"
MAX_BYTES = 1 << 20


def read_files(folder: Path) -> dict[str, str]:
    """The templates of a folder that have files of their own, by name; `default` first.

    Raises:
        CheckpointError: one is larger than 1 MiB, is not UTF-8, or cannot be read.
    """
    found = {}
    if regular_file.exists(folder / TEMPLATE_FILE):
        found[DEFAULT] = read_file(folder / TEMPLATE_FILE)
    more = folder / TEMPLATE_FOLDER
    if regular_file.is_folder(more):
        with regular_file.reading(more):
            files = sorted(file for file in more.iterdir() if file.suffix == ".jinja")
        found.update({file.stem: read_file(file) for file in files if file.name[0] != "."})
    return found


def read_file(path: Path) -> str:
    """A template in a file of its own.

    Raises:
        CheckpointError: larger than 1 MiB, not UTF-8, or unreadable.
    """
    data = regular_file.read(path, limit_bytes=MAX_BYTES)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "not UTF-8", where=str(path), found=f"byte {error.start}", remedy="Download it again."
        ) from None


def of_entry(entry: object, where: str, kind: type[QmixError] = CheckpointError) -> dict[str, str]:
    """The templates of a `chat_template` entry: a string, a list of named ones, or an object.

    Args:
        kind: the class of the error.

    Raises:
        QmixError: another form, or a template larger than 1 MiB.
    """
    if entry is None:
        return {}
    named: dict[Any, Any] = {}
    if isinstance(entry, str):
        named = {DEFAULT: entry}
    elif isinstance(entry, Mapping):
        named = dict(entry)
    elif isinstance(entry, list) and all(
        isinstance(each, Mapping) and {"name", "template"} <= set(each) for each in entry
    ):
        named = {str(each["name"]): each["template"] for each in entry}
    if not named or not all(isinstance(text, str) for text in (*named, *named.values())):
        raise kind(
            "wrong value",
            where=where,
            expected="a template, or a list of objects with name and template",
            found=repr(entry)[:80],
            remedy="Correct the entry or remove it.",
        )
    size = max(len(text) for text in named.values())
    if size > MAX_BYTES:
        raise kind(
            "the template is too large",
            where=where,
            expected=f"at most {MAX_BYTES} characters",
            found=size,
        )
    return named


def choose(templates: Mapping[str, str], name: str | None, *, tools: bool) -> str | None:
    """The name of the template that is meant; None if there is none at all.

    Without a name it is `tool_use` where tools are given and there is one, otherwise `default`.

    Raises:
        UsageError: there is none of that name, or none by default.
    """
    if name is None:
        if not templates:
            return None
        name = _TOOLS if tools and _TOOLS in templates else DEFAULT
    if name not in templates:
        raise UsageError(
            f"there is no chat template {name!r}",
            where="chat_template",
            expected="one of " + ", ".join(sorted(templates)) if templates else "none at all",
        )
    return name


def file_of(name: str) -> Path:
    """Where a template of this name is kept, in the checkpoint's folder."""
    return Path(TEMPLATE_FILE) if name == DEFAULT else Path(TEMPLATE_FOLDER, f"{name}.jinja")


def entry(templates: Mapping[str, str]) -> str | list[dict[str, str]] | None:
    """The `chat_template` entry of a config that holds these templates."""
    if set(templates) <= {DEFAULT}:
        return templates.get(DEFAULT)
    return [{"name": name, "template": text} for name, text in templates.items()]
