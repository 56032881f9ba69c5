"""A conversation in a file: JSON that people can read, with its settings and whose words they are.

    {"format": "qmix-chat", "version": 1, "model": {"name": ..., "sha256": ...}, "system": ...,
     "settings": {...}, "messages": [{"role": "user", "content": ...}, ...]}

Knows no model and no tokenizer: answers are text.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.files import regular_file
from qmix.quantities import counted

FORMAT, VERSION = "qmix-chat", 1
_LIMIT_BYTES = 64 << 20
_ROLES = ("user", "assistant")


@dataclass(frozen=True)
class ModelIdentity:
    """Which model answered.

    Attributes:
        name: of its folder or file.
        sha256: of its routers, which tells another model of the same name; empty behind a server.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class SavedChat:
    """What a file holds.

    Attributes:
        settings: fields of a GenerationConfig, as JSON.
        turns: user message and answer.
    """

    model: ModelIdentity
    system: str | None
    turns: tuple[tuple[str, str], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def save(path: Path, chat: SavedChat) -> None:
    """Write the file, for its owner alone. It replaces a saved chat, and nothing else.

    Raises:
        UsageError: another file is there, or a folder.
        WriteError: the file cannot be written; the old one is unchanged.
    """
    if regular_file.exists(path) and not _is_saved_chat(path):
        raise UsageError(
            "there is something else already, and it was left alone",
            where=str(path),
            expected="a new name, or an earlier chat",
            found="a folder" if path.is_dir() else "another file",
        )
    messages = [
        {"role": role, "content": content}
        for turn in chat.turns
        for role, content in zip(_ROLES, turn, strict=True)
    ]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(chat.model),
        "system": chat.system,
        "settings": dict(chat.settings),
        "messages": messages,
    }
    strict_json.write(path, document, private=True, readable=True)


def _is_saved_chat(path: Path) -> bool:
    try:
        return strict_json.read(path, limit_bytes=_LIMIT_BYTES).get("format") == FORMAT
    except CheckpointError:
        return False


def read(path: Path) -> SavedChat:
    """Read a file.

    Raises:
        CheckpointError: it is missing, too large, or not a saved chat; the error names the entry.
    """
    document = strict_json.read(path, limit_bytes=_LIMIT_BYTES)

    def refuse(where: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            "not a saved chat", where=f"{path}: {where}", expected=expected, found=repr(found)[:80]
        )

    def entry(of: Mapping[str, Any], name: str, kind: type, where: str, expected: str) -> Any:
        value = of.get(name)
        if not isinstance(value, kind):
            raise refuse(where, expected, value)
        return value

    version = (document.get("format"), document.get("version"))
    if version != (FORMAT, VERSION):
        raise refuse("format", f"{FORMAT} {VERSION}", version)
    unknown = document.keys() - {"format", "version", "model", "system", "settings", "messages"}
    if unknown:
        raise refuse(min(unknown), "no such entry", document[min(unknown)])
    model = entry(document, "model", dict, "model", "name and sha256")
    identity = ModelIdentity(
        *(entry(model, name, str, f"model.{name}", "a text") for name in ("name", "sha256"))
    )
    system = document.get("system")
    if system is not None and not isinstance(system, str):
        raise refuse("system", "a text or null", system)
    settings = entry(document, "settings", dict, "settings", "an object")
    messages = entry(document, "messages", list, "messages", "a list")
    texts = []
    for index, message in enumerate(messages):
        where, role = f"messages[{index}]", _ROLES[index % 2]
        if not isinstance(message, dict) or message.get("role") != role:
            raise refuse(where, f"the role {role}", message)
        texts.append(entry(message, "content", str, f"{where}.content", "a text"))
    if len(texts) % 2:
        raise refuse("messages", "an answer to each message", counted(len(texts), "message"))
    return SavedChat(identity, system, tuple(zip(texts[::2], texts[1::2], strict=True)), settings)


def differences(chat: SavedChat, model: ModelIdentity) -> Iterable[str]:
    """What a reader should know before it goes on with another model."""
    known = chat.model.sha256 and model.sha256
    if chat.model != model if known else chat.model.name != model.name:
        same = " of the same name" if chat.model.name == model.name else ""
        yield f"the answers are those of another model{same}: {chat.model.name}"
