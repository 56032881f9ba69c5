"""What Tab offers in the chat: commands, settings, their values, paths and models.

The commands describe themselves in a table of `Command`; this file knows none of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from qmix.commands.line_editing.command import Argument, Command


@dataclass(frozen=True)
class ChatCompleter(Completer):
    """Completes commands and what they take; a message is completed nowhere.

    Args:
        settings: the values that are offered for each setting's name; none means any value.
        models: lists the names of models, asked at each Tab; paths are offered beside them.
    """

    commands: Sequence[Command]
    settings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    models: Callable[[], Iterable[str]] = tuple

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            matching = (command for command in self.commands if command.name.startswith(name))
            yield from (
                Completion(command.name, -len(name), display_meta=command.help)
                for command in matching
            )
            return
        kinds = (command.argument for command in self.commands if command.name == name)
        yield from self._arguments(next(kinds, Argument.NONE), argument, complete_event)

    def _arguments(
        self, kind: Argument, argument: str, event: CompleteEvent
    ) -> Iterator[Completion]:
        argument = argument.lstrip()
        if kind is Argument.SETTING:
            name, space, value = argument.partition(" ")
            offered = self.settings.get(name, ()) if space else self.settings
            yield from _starting(offered, value.lstrip() if space else name)
        if kind is Argument.MODEL:
            yield from _starting(self.models(), argument)
        if kind in (Argument.PATH, Argument.MODEL):
            paths = PathCompleter(expanduser=True)
            yield from paths.get_completions(Document(argument), event)


def _starting(words: Iterable[str], beginning: str) -> Iterator[Completion]:
    return (Completion(word, -len(beginning)) for word in words if word.startswith(beginning))
