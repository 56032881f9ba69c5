"""Commands that look at what the model got and gave: numbers, tokens, probabilities, experts."""

from dataclasses import replace
from typing import TYPE_CHECKING

from qmix.commands.chat.chat_model import Reply, TokenChoice
from qmix.commands.chat.expert_use import heatmap
from qmix.commands.chat.reply_stats import ConversationStats
from qmix.commands.markdown.cells import cells, folded
from qmix.errors import UsageError
from qmix.planning.speed import figure
from qmix.printable import escaped
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix.commands.repl import Repl

_NONE_YET = "there is no reply yet"
_PIECE = 10  # columns of a token; with its probability and a space before it, twice as many


def stats(repl: "Repl", argument: str) -> None:
    session = repl.session
    last = session.stats
    if last is None:
        raise UsageError(_NONE_YET)
    whole = ConversationStats.of(session.replies)
    limit = session.model.bound(replace(last, experts=whole.experts))
    repl.notice(f"reply         {last}")
    if limit is not None:
        share = 100 * last.tokens_per_s / limit.tokens_per_s
        repl.notice(
            f"memory allows {figure(limit.tokens_per_s)} tok/s ({limit.source}); "
            f"the reply had {figure(share) if share else 0} % of that"
        )
    if last.drafts is not None:
        repl.notice(f"its drafts    {last.drafts}")
    if last.experts is not None:
        repl.notice(f"its {last.experts}")
    if last.energy_j is not None and last.new_tokens:
        per_token = last.energy_j / last.new_tokens
        repl.notice(f"its energy    {last.energy_j:.0f} J, {per_token:.2f} J a token")
    repl.notice(f"conversation  {whole}")
    if whole.drafts is not None:
        repl.notice(f"all drafts    {whole.drafts}")
    if whole.experts is not None:
        repl.notice(f"all {whole.experts}")
    if whole.energy_j is not None:
        repl.notice(f"all energy    {whole.energy_j:.0f} J")


def tokens(repl: "Repl", argument: str) -> None:
    session = repl.session
    if argument:
        found = session.model.tokens(argument)
        pieces = (f"{piece} {index}" for piece, index in found)
        repl.notice(f"{counted(len(found), 'token')}: {' · '.join(pieces)}")
        return
    for number, turn in enumerate(session.turns, 1):
        asked, replied = session.model.count(turn.user), session.model.length(turn.answer)
        if asked is None or replied is None:
            raise UsageError("the server does not tell the tokens of a text")
        hidden = f", of which {turn.hidden:,} are no longer in the context" if turn.hidden else ""
        repl.notice(f"{number:>4}  message {asked:,}, reply {replied:,}{hidden}")
    used = (session.stats.context_tokens or 0) if session.stats and session.turns else 0
    limit = "" if session.context is None else f" of {session.context:,}"
    repl.notice(f"context {used:,}{limit} tokens after the last reply")


def prompt(repl: "Repl", argument: str) -> None:
    given = _last(repl).prompt
    repl.notice(repl.session.model.prompt_text(given))
    repl.notice(f"{counted(len(given.ids), 'id')}: {' '.join(map(str, given.ids))}")


def probabilities(repl: "Repl", argument: str) -> None:
    reply = _last(repl)
    choices = reply.choices()
    if not choices:
        raise UsageError(_NONE_YET)
    repl.notice(f"token, its probability, and the likeliest others, {reply.choices_are}")
    most = max(1, repl.streams.notices.width // (2 * _PIECE) - 1)
    for choice in choices:
        repl.notice(_line(choice, most))


def _line(choice: TokenChoice, most: int) -> str:
    """A token and at most so many others, each in columns of its own."""
    others = [pair for pair in choice.others if pair[1] > 0]
    pairs = [(choice.piece, choice.probability), *others[:most]]
    return "  ".join(f"{_column(piece)} {100 * share:5.1f} %" for piece, share in pairs)


def _column(piece: str) -> str:
    """A token on `_PIECE` columns; a longer one without its end."""
    piece = escaped(piece)
    if cells(piece) > _PIECE:
        piece = next(folded(piece, _PIECE - 1)) + "…"
    return piece + " " * (_PIECE - cells(piece))


def experts(repl: "Repl", argument: str) -> None:
    reply = _last(repl)
    counts = reply.expert_counts()
    encoding = repl.streams.notices.encoding
    repl.notice(heatmap(counts, reply.stats().new_tokens, encoding=encoding))


def _last(repl: "Repl") -> Reply:
    """The last reply.

    Raises:
        UsageError: there is none.
    """
    if repl.session.last is None:
        raise UsageError(_NONE_YET)
    return repl.session.last
