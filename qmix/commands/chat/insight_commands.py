"""Commands that look at what the model got and gave: numbers, tokens, probabilities, experts."""

from typing import TYPE_CHECKING

from qmix.commands.chat.expert_use import heatmap
from qmix.commands.chat.reply_stats import ConversationStats
from qmix.commands.chat.start_line import bound
from qmix.commands.chat.token_choices import Choice
from qmix.errors import UsageError
from qmix.planning.speed import figure
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix.commands.repl import Repl

_NONE_YET = "there is no reply yet"
_PIECE = 14  # columns of a token
_OTHERS = 3  # alternatives that fit a line of 80 columns


def stats(repl: "Repl", argument: str) -> None:
    session = repl.session
    last = session.stats
    if last is None:
        raise UsageError(_NONE_YET)
    whole = ConversationStats.of(session.replies)
    limit = bound(repl.source, session, whole.experts)
    share = 100 * last.tokens_per_s / limit.tokens_per_s
    repl.notice(f"reply         {last}")
    repl.notice(
        f"memory allows {figure(limit.tokens_per_s)} tok/s ({limit.source}); "
        f"the reply had {figure(share) if share else 0} % of that"
    )
    if last.experts is not None:
        repl.notice(f"its {last.experts}")
    if last.energy_j is not None and last.new_tokens:
        per_token = last.energy_j / last.new_tokens
        repl.notice(f"its energy    {last.energy_j:.0f} J, {per_token:.2f} J a token")
    repl.notice(f"conversation  {whole}")
    if whole.experts is not None:
        repl.notice(f"all {whole.experts}")
    if whole.energy_j is not None:
        repl.notice(f"all energy    {whole.energy_j:.0f} J")


def tokens(repl: "Repl", argument: str) -> None:
    session = repl.session
    if argument:
        ids = session.tokenizer.encode(
            argument, add_special_tokens=False, split_special_tokens=True
        )
        pieces = (f"{_piece(repl, index)} {index}" for index in ids)
        repl.notice(f"{counted(len(ids), 'token')}: {' · '.join(pieces)}")
        return
    for number, turn in enumerate(session.turns, 1):
        asked = len(session.tokenizer.encode(turn.user, add_special_tokens=False))
        hidden = f", of which {turn.hidden:,} are no longer in the context" if turn.hidden else ""
        repl.notice(f"{number:>4}  message {asked:,}, reply {len(turn.answer):,}{hidden}")
    used = session.stats.context_tokens if session.stats and session.turns else 0
    repl.notice(f"context {used:,} of {session.context:,} tokens after the last reply")


def prompt(repl: "Repl", argument: str) -> None:
    session = repl.session
    if not session.last_prompt:
        raise UsageError(_NONE_YET)
    ids = list(session.last_prompt)
    repl.notice(session.tokenizer.decode(ids, skip_special_tokens=False))
    repl.notice(f"{counted(len(ids), 'id')}: {' '.join(map(str, ids))}")


def probabilities(repl: "Repl", argument: str) -> None:
    choices = repl.session.choices.choices()
    if not choices:
        raise UsageError(_NONE_YET)
    repl.notice("token, its probability, and the likeliest others, as the sampler saw them")
    for choice in choices:
        repl.notice(_line(repl, choice))


def _line(repl: "Repl", choice: Choice) -> str:
    others = [pair for pair in choice.likeliest if pair[0] != choice.id and pair[1] > 0]
    shown = "".join(
        f"  {_piece(repl, index):>{_PIECE}} {100 * share:5.1f} %"
        for index, share in others[:_OTHERS]
    )
    return f"{_piece(repl, choice.id):<{_PIECE}} {100 * choice.probability:5.1f} %{shown}"


def _piece(repl: "Repl", index: int) -> str:
    """A token as it is written in the vocabulary, with its spaces and line ends visible."""
    name = repl.session.tokenizer.convert_ids_to_tokens(index)
    return f"{name}"


def experts(repl: "Repl", argument: str) -> None:
    counts = repl.session.expert_counts()
    encoding = repl.streams.notices.encoding
    repl.notice(heatmap(counts, len(repl.session.choices), encoding=encoding))
