"""The regular expressions of settings, read into a graph that is matched in linear time.

Settings choose modules by regular expressions (GPTQ's `dynamic`, compressed-tensors' `re:`), and a
backtracking matcher can be made to work for ever on one. Here an expression becomes a graph of
single characters (Glushkov's construction), which `name_matcher` walks without going back. The
grammar is what such files need: characters, sets, `.`, escapes, groups, alternatives, `?`, repeats
of one character, anchors, and lookaheads at the start. Knows no layout and no file.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from qmix.errors import CheckpointError, QmixError, UnsupportedError

MAX_LENGTH = 1024  # of an expression
_MAX_DEPTH = 16  # of groups in groups
_MAX_COUNT = 64  # of a counted repeat, such as {2,64}
# How many ways a backtracking reader may have to try on a name of 64 characters, as a power of two:
# 6 for `*` or `+`, 1 for `?`. Expressions of real files have at most 21.
_MAX_CHOICES = 24
_MAX_SETS = 512  # in all expressions of a file
_UNBOUNDED = math.log2(64)

END = ""  # what `$` matches: it follows the last character of a name
_COUNTED = re.compile(r"\{(\d{0,9})(,?)(\d{0,9})\}")
_TOO_MANY_DIGITS = re.compile(r"\{\d*,?\d{10}")
_SET = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_ESCAPES = "dDsSwW"
_REMEDY = "Write it as several simpler expressions."


@dataclass
class Graph:
    """The characters of several expressions, by position.

    Attributes:
        accepts: whether a position takes a character, or END.
        follow: the sets of positions that may follow a position.
        branch: the number of the branch that a position belongs to.
        last: the positions that may end their branch.
        sets: what takes the characters of a set, of `.` or of a class, by its text.
    """

    accepts: list[Callable[[str], bool]] = field(default_factory=list)
    follow: list[list[frozenset[int]]] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    last: set[int] = field(default_factory=set)
    sets: dict[str, Callable[[str], bool]] = field(default_factory=dict)

    def add(self, accepts: Callable[[str], bool], branch: int) -> int:
        self.accepts.append(accepts)
        self.follow.append([])
        self.branch.append(branch)
        return len(self.accepts) - 1


class Fragment(NamedTuple):
    """A part of an expression: where it may begin and end.

    Attributes:
        empty: whether it matches the empty text.
        choices: how many ways a backtracking matcher may try, as a power of two.
    """

    empty: bool = True
    first: frozenset[int] = frozenset()
    last: frozenset[int] = frozenset()
    choices: float = 0


@dataclass(frozen=True)
class Branch:
    """What must match from the start of a name, or must not: an expression or its lookahead."""

    number: int
    fragment: Fragment
    wanted: bool = True


def parse(text: str, where: str, graph: Graph, next_branch: int) -> tuple[Branch, ...]:
    """Add an expression to the graph: its lookaheads and itself, all of which must hold.

    Args:
        text: as Python's `re` reads it.
        where: the file and the key, for errors.
        next_branch: the number of the first branch.

    Raises:
        CheckpointError: not a regular expression.
        UnsupportedError: longer or more intricate than any that is read.
    """
    parser = _Parser(text, where, graph, next_branch)
    if len(text) > MAX_LENGTH:
        raise parser.intricate(f"at most {MAX_LENGTH} characters", f"{len(text)} characters")
    branches: list[Branch] = []
    parser.take("^")
    while parser.text.startswith(("(?!", "(?="), parser.at):
        wanted = parser.text[parser.at + 2] == "="
        parser.at += 3
        lookahead = parser.alternatives(at_start=True, depth=1)
        parser.close()
        branches.append(parser.finish(lookahead, wanted))
    whole = parser.alternatives(at_start=True, depth=0)
    if parser.at < len(text):
        raise parser.malformed("unbalanced parenthesis")
    if branches and parser.has_alternatives:
        raise parser.intricate("no lookahead before alternatives", text[:80])
    return (*branches, parser.finish(whole, True))


@dataclass
class _Parser:
    text: str
    where: str
    graph: Graph
    branch: int
    at: int = 0
    has_alternatives: bool = False  # outside of groups

    def take(self, token: str) -> bool:
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def close(self) -> None:
        if not self.take(")"):
            raise self.malformed("missing )")

    def finish(self, fragment: Fragment, wanted: bool) -> Branch:
        self.graph.last |= fragment.last
        self.branch += 1
        return Branch(self.branch - 1, fragment, wanted)

    def alternatives(self, *, at_start: bool, depth: int) -> Fragment:
        """Sequences that are separated by `|`."""
        if depth > _MAX_DEPTH:
            raise self.intricate(f"at most {_MAX_DEPTH} groups in groups", "more")
        parts = [self.sequence(at_start, depth)]
        while self.take("|"):
            self.has_alternatives |= depth == 0
            parts.append(self.sequence(at_start, depth))
        choices = max(part.choices for part in parts) + math.log2(len(parts))
        return self.checked(
            Fragment(
                any(part.empty for part in parts),
                frozenset().union(*(part.first for part in parts)),
                frozenset().union(*(part.last for part in parts)),
                choices,
            )
        )

    def sequence(self, at_start: bool, depth: int) -> Fragment:
        whole = Fragment()
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if self.take("^") or self.take(r"\A"):
                if not at_start:
                    raise self.intricate("an anchor ^ at the start only", "one inside")
                continue
            whole = self.joined(whole, self.piece(at_start, depth))
            at_start = False
        return whole

    def joined(self, a: Fragment, b: Fragment) -> Fragment:
        for position in a.last:
            self.graph.follow[position].append(b.first)
        return self.checked(
            Fragment(
                a.empty and b.empty,
                a.first | b.first if a.empty else a.first,
                a.last | b.last if b.empty else b.last,
                a.choices + b.choices,
            )
        )

    def piece(self, at_start: bool, depth: int) -> Fragment:
        """One character or group, with what repeats it."""
        if not self.take("("):
            return self.repeated(self.character())
        if self.take("?"):
            named = re.compile(r"P<[^\W\d]\w*>").match(self.text, self.at)
            if named:
                self.at = named.end()
            elif not self.take(":"):
                raise self.intricate("groups (...), (?:...) and (?P<name>...)", "another (?...)")
        group = self.alternatives(at_start=at_start, depth=depth + 1)
        self.close()
        if self.take("?"):
            self.take("?")
            group = Fragment(True, group.first, group.last, group.choices + 1)
        if self.text.startswith(("*", "+", "?"), self.at) or _COUNTED.match(self.text, self.at):
            raise self.intricate("no repeated group", self.text[:80])
        return self.checked(group)

    def character(self) -> Callable[[str], bool]:
        """What takes one character."""
        if found := _SET.match(self.text, self.at):
            self.at = found.end()
            return self.compiled(found[0])
        char, self.at = self.text[self.at], self.at + 1
        if char == "$":
            return END.__eq__
        if char == ".":
            return self.compiled(char)
        if char in "*+?[":
            raise self.malformed("nothing to repeat" if char != "[" else "unterminated set")
        if char != "\\":
            return char.__eq__
        if self.at == len(self.text):
            raise self.malformed("bad escape at the end")
        escaped, self.at = self.text[self.at], self.at + 1
        if escaped == "Z":
            return END.__eq__
        if escaped in _ESCAPES:
            return self.compiled("\\" + escaped)
        if escaped.isalnum():
            raise self.intricate(f"escapes of {_ESCAPES} and signs", "\\" + escaped)
        return escaped.__eq__

    def compiled(self, single: str) -> Callable[[str], bool]:
        """What takes the characters that `re` takes for an expression of one character."""
        if single not in self.graph.sets:
            if len(self.graph.sets) == _MAX_SETS:
                raise self.intricate(f"at most {_MAX_SETS} different sets", single[:80])
            self.graph.sets[single] = self.one_of(single)
        return self.graph.sets[single]

    def one_of(self, single: str) -> Callable[[str], bool]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Python may come to read such a set in another way
                pattern = re.compile(single)
        except (re.error, FutureWarning) as error:
            raise self.malformed(str(error)) from None
        return lambda char: pattern.fullmatch(char) is not None

    def repeated(self, accepts: Callable[[str], bool]) -> Fragment:
        """A character that is repeated at least `low` and at most `high` times."""
        low, high = self.counts()
        whole = Fragment()
        for number in range(max(low, 1) if high is None else high):
            position = frozenset([self.graph.add(accepts, self.branch)])
            optional = number >= low
            whole = self.joined(whole, Fragment(optional, position, position, float(optional)))
        if high is None:
            (position_again,) = position
            self.graph.follow[position_again].append(position)
            whole = Fragment(whole.empty, whole.first, whole.last, whole.choices + _UNBOUNDED)
        return self.checked(whole)

    def counts(self) -> tuple[int, int | None]:
        """The bounds that follow a character; None if there is no upper one."""
        bounds = self.quantifier()
        if bounds is None:
            return 1, 1
        if self.text.startswith(("*", "+"), self.at) or _COUNTED.match(self.text, self.at):
            raise self.intricate("one repeat of a character", self.text[:80])
        self.take("?")  # a lazy repeat matches the same names
        if self.text.startswith("?", self.at):
            raise self.malformed("multiple repeat")
        return bounds

    def quantifier(self) -> tuple[int, int | None] | None:
        for token, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(token):
                return bounds
        if _TOO_MANY_DIGITS.match(self.text, self.at):
            raise self.intricate(f"at most {_MAX_COUNT} repeats", "more")
        counted = _COUNTED.match(self.text, self.at)
        if not counted or not (counted[1] or counted[2]):
            return None  # a brace like any other character
        self.at = counted.end()
        low = int(counted[1] or 0)
        high = low if not counted[2] else int(counted[3]) if counted[3] else None
        if max(low, high or 0) > _MAX_COUNT:
            raise self.intricate(f"at most {_MAX_COUNT} repeats", counted[0])
        if high is not None and high < low:
            raise self.malformed("min repeat greater than max repeat")
        return low, high

    def checked(self, fragment: Fragment) -> Fragment:
        if fragment.choices > _MAX_CHOICES:
            raise self.intricate("fewer repeats and alternatives", self.text[:80])
        return fragment

    def malformed(self, reason: str) -> QmixError:
        found = f"{reason} at position {self.at}"
        return CheckpointError(
            "not a regular expression",
            where=self.where,
            expected="one that Python's re reads",
            found=found,
        )

    def intricate(self, expected: str, found: str) -> QmixError:
        return UnsupportedError(
            "the expression is too intricate to be matched safely",
            where=self.where,
            expected=expected,
            found=found,
            remedy=_REMEDY,
        )


def union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    """All positions of several sets."""
    return frozenset().union(*sets)
