"""Commands between the conversation and the world: files, the clipboard, another model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.commands import sources
from qmix.commands.chat import clipboard, saved_chat, settings
from qmix.commands.chat.attached_file import attached, user_path
from qmix.commands.chat.saved_chat import SavedChat
from qmix.errors import QmixError, UnsupportedError, UsageError
from qmix.formats.metadata import read_metadata
from qmix.hub import cache, made
from qmix.hub.remote import HubOptions
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix.commands.repl import Repl

_BLOCK = re.compile(r"^(`{3,}|~{3,})[^\n]*\n(.*?)^\1[`~]*[ \t]*$", re.DOTALL | re.MULTILINE)


def save(repl: "Repl", argument: str) -> None:
    path = _path(argument, "/save FILE")
    session = repl.session
    saved_chat.save(
        path,
        SavedChat(
            model=session.model.identity,
            system=session.system,
            turns=tuple((turn.user, session.text_of(turn)) for turn in session.turns),
            settings=settings.to_json(session.config),
        ),
    )
    kept = session.keep_cache()
    also = f"; {counted(kept, 'token')} of it need not be computed again" if kept else ""
    repl.notice(f"saved {counted(len(session.turns), 'turn')} to {path}{also}")


def load(repl: "Repl", argument: str) -> None:
    path = _path(argument, "/load FILE")
    found = saved_chat.read(path)
    session = repl.session
    try:
        config = settings.from_json(session.config, found.settings, by="/load")
    except UsageError as error:
        raise error.at(f"{path}: settings.{error.where}") from None
    session.restore(found.turns)
    session.config, session.system = config, found.system
    own = session.model.identity
    for difference in saved_chat.differences(found, own):
        repl.notice(f"{difference}; the next reply is {own.name}'s")
    repl.notice(f"loaded {counted(len(found.turns), 'turn')} and the settings of {path}")


def attach(repl: "Repl", argument: str) -> None:
    if argument == "-":
        repl.notice(f"dropped {counted(len(repl.attached), 'file')}")
        repl.attached.clear()
        return
    if not argument:
        names = ", ".join(file.name for file in repl.attached)
        repl.notice(f"with the next message: {names or 'no file'} (/file PATH [10-40], /file -)")
        return
    file = attached(argument)
    tokens, limit = repl.session.model.count(file.block), repl.session.context
    if tokens is not None and limit is not None and tokens >= limit:
        raise UsageError(
            "does not fit the context",
            where=file.name,
            expected=f"fewer than {limit:,} tokens",
            found=f"{tokens:,}",
            remedy="Give some of its lines: /file PATH 10-40.",
        )
    repl.attached.append(file)
    damage = f"; {counted(file.damaged, 'invalid byte')} became U+FFFD" if file.damaged else ""
    size = counted(len(file.text.splitlines()), "line")
    if tokens is not None:
        size += f", {counted(tokens, 'token')}"
    repl.notice(f"{file.name}: {size}{damage}; goes with the next message")


def image(repl: "Repl", argument: str) -> None:
    raise UnsupportedError(
        "/image: Mixtral reads text only", remedy="/file PATH takes a text file along."
    )


def copy(repl: "Repl", argument: str) -> None:
    """`/copy [n]` counts replies back from the last; `/copy code [n]` their fenced blocks."""
    kind, _, number = argument.partition(" ") if argument.startswith("code") else ("", "", argument)
    number = number.strip() or "1"
    if kind not in ("", "code") or not number.isdecimal() or int(number[:9]) < 1:
        raise UsageError("nothing to copy", expected="/copy [n] or /copy code [n]", found=argument)
    texts = [repl.session.text_of(turn) for turn in repl.session.turns]
    if kind:
        texts = [block[2] for text in texts for block in _BLOCK.finditer(text)]
    index, what = int(number[:9]), "code block" if kind else "reply"
    if index > len(texts):
        have = counted(len(texts), what)
        raise UsageError(f"there is no such {what}", expected=f"up to {have}", found=index)
    text = texts[-index]
    ways = clipboard.copy(text, repl.streams.screen)
    if not ways:
        raise UsageError("there is no clipboard", remedy="Install wl-copy, xclip or xsel.")
    repl.notice(f"copied {counted(len(text), 'character')} to {' and '.join(ways)}")


def switch(repl: "Repl", argument: str) -> None:
    """Another model for the same words; if it does not load, the old one is loaded again."""
    if not argument:
        repl.notice(repl.start_line)
        return
    loader, old = repl.loader, repl.directory
    if loader is None or old is None:
        raise UsageError("this chat cannot switch its model")
    directory = sources.local(user_path(argument))
    read_metadata(directory)  # what is refused here costs the old model nothing
    session, name = repl.session, repl.session.model.identity.name
    texts = [(turn.user, session.text_of(turn)) for turn in session.turns]
    given = session.config.given_by(settings.USER)
    repl.notice(f"freeing {name}; the conversation stays")
    session.release()
    failure = None
    try:
        repl.switch(loader, directory, given)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the chat goes on
        failure = str(error) if isinstance(error, QmixError) else type(error).__name__
    if failure is not None:  # the clause's traceback would keep what has been loaded
        repl.notice(f"{failure}\nloading {name} again")
        repl.switch(loader, old, given)
    repl.session.restore(texts)
    repl.notice(repl.start_line)


def known_models() -> Iterator[str]:
    """What Tab offers for a model beside paths: the folders that qmix made, and the hub's cache."""
    yield from map(str, made.folders())
    yield from map(str, cache.models(HubOptions()))


def _path(argument: str, usage: str) -> Path:
    if not argument:
        raise UsageError("which file?", expected=usage)
    return user_path(argument)
