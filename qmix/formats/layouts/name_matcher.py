"""Which of many expressions match a name: all at once, with a bounded amount of work.

The characters of a name are taken one by one; what is known after each is remembered, so that the
many names of a model, which are much alike, cost one look-up a character. Knows no layout.
"""

from collections import Counter
from dataclasses import dataclass, field

from qmix.errors import UnsupportedError
from qmix.formats.layouts.name_expression import END, Branch, Graph, parse, union

_MAX_CHARACTERS = 1 << 16  # of all expressions; a rule for each matrix of Mixtral-8x7B has 54,000
_MAX_WORK = 600_000  # positions that are looked at before an answer is remembered: half a second

_State = tuple[
    frozenset[int], frozenset[int]
]  # positions that may come next, branches that matched


@dataclass
class NameMatcher:
    """Expressions, each of which matches a name from its start, as Python's `re.match` does.

    Args:
        expressions: pairs of the key in the file, for errors, and the expression.
        where: the file and field.

    Raises:
        CheckpointError: one is not a regular expression.
        UnsupportedError: one is too intricate, or all together are too long.
    """

    expressions: tuple[tuple[str, str], ...]
    where: str
    _graph: Graph = field(default_factory=Graph, init=False, repr=False)
    _branches: list[tuple[Branch, ...]] = field(default_factory=list, init=False, repr=False)
    _owner: list[int] = field(default_factory=list, init=False, repr=False)  # of each branch
    _start: _State = field(default=(frozenset(), frozenset()), init=False, repr=False)
    _states: dict[_State, _State] = field(default_factory=dict, init=False, repr=False)
    _next: dict[tuple[_State, str], _State] = field(default_factory=dict, init=False, repr=False)
    _first: dict[frozenset[int], int | None] = field(default_factory=dict, init=False, repr=False)
    _work: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        characters = sum(len(text) for _, text in self.expressions)
        for index, (key, text) in enumerate(self.expressions):
            where = f"{self.where}: {key[:80]}"
            if characters > _MAX_CHARACTERS:
                raise _exhausted(where, f"at most {_MAX_CHARACTERS} characters", characters)
            branches = parse(text, where, self._graph, len(self._owner))
            self._branches.append(branches)
            self._owner += [index] * len(branches)
        every = [branch for branches in self._branches for branch in branches]
        self._start = (
            union(branch.fragment.first for branch in every if not branch.fragment.empty),
            frozenset(branch.number for branch in every if branch.fragment.empty),
        )

    def first(self, name: str) -> int | None:
        """The index of the first expression that matches `name`; None if none does.

        Raises:
            UnsupportedError: the expressions need more work than any real ones.
        """
        state = self._start
        for symbol in (*name, END):
            if not state[0]:
                break
            known = self._next.get((state, symbol))
            if known is None:
                known = self._step(state, symbol)
                known = self._next[state, symbol] = self._states.setdefault(known, known)
            state = known
        matched = state[1]
        if matched not in self._first:
            holding = (
                index
                for index in sorted({self._owner[number] for number in matched})
                if all((part.number in matched) == part.wanted for part in self._branches[index])
            )
            self._first[matched] = next(holding, None)
        return self._first[matched]

    def _step(self, state: _State, symbol: str) -> _State:
        """What is known after one more character."""
        graph = self._graph
        active, matched = state
        taken = [position for position in active if graph.accepts[position](symbol)]
        ended = {graph.branch[position] for position in taken if position in graph.last}
        matched = matched | ended
        sets = [
            positions
            for position in taken
            if graph.branch[position] not in matched
            for positions in graph.follow[position]
        ]
        self._work += len(active) + sum(map(len, sets))
        if self._work > _MAX_WORK:
            owners = Counter(self._owner[graph.branch[position]] for position in active)
            ((index, _),) = owners.most_common(1)
            where = f"{self.where}: {self.expressions[index][0][:80]}"
            raise _exhausted(where, "less work than a second takes", "more")
        return union(sets) if sets else frozenset(), matched


def _exhausted(where: str, expected: str, found: object) -> UnsupportedError:
    return UnsupportedError(
        "the expressions are too many or too intricate to be matched safely",
        where=where,
        expected=expected,
        found=found,
        remedy="Write fewer and simpler ones.",
    )
