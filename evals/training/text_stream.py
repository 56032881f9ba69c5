"""The corpus as batches of training tokens: passages, and conversations made from its docstrings.

Knows nothing of the model.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qmix.evals import corpus
from qmix.evals.training.plan import TrainingPlan
from qmix.evals.training.train_tokenizer import EOS
from qmix.text import chat_template
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer

ANSWER_CHARS = 150  # a shorter first paragraph is joined by the next one

_HEADING = re.compile(r"[A-Za-z_](?:[\w.]*\w)?(\(.*\))?")
_QUESTIONS = (
    "What is {}?",
    "What does {} do?",
    "Explain {}.",
    "Tell me about {}.",
    "How do I use {}?",
    "Describe {} in short.",
    "what is {}",
    "{}",
)


def questions(document: corpus.Document) -> Iterator[tuple[str, str]]:
    """(subject, first words about it) of a topic, or of every object with a docstring."""
    kind, _, name = document.name.partition(":")
    paragraphs = document.paragraphs
    if kind == "topic":
        prose = (p for p in paragraphs if p[:1].isalpha() and "***" not in p and len(p) >= 60)
        answer = next(prose, None)
        if answer:
            yield name.replace("-", " "), _unwrapped(answer)
        return
    for index, heading in enumerate(paragraphs):
        if _is_heading(heading, index):
            answer = _first_words(paragraphs[index + 1 :])
            if answer:
                yield heading.partition("(")[0], answer


def _is_heading(paragraph: str, index: int) -> bool:
    """Whether it is `module.name(arguments)`, or at the top of a document a single word."""
    return bool(_HEADING.fullmatch(paragraph)) and (index == 0 or bool({".", "("} & set(paragraph)))


def _first_words(paragraphs: Sequence[str]) -> str:
    """The paragraphs before the next heading, until they are long enough for an answer."""
    chosen: list[str] = []
    for paragraph in paragraphs[:3]:
        if _is_heading(paragraph, 1) or sum(map(len, chosen)) >= ANSWER_CHARS:
            break
        chosen.append(_unwrapped(paragraph))
    return "\n\n".join(chosen)


def _unwrapped(paragraph: str) -> str:
    """Prose on one line; indented text and lists keep their lines."""
    lines = paragraph.split("\n")
    if all(line[:1].isalnum() or line[:1] in "\"'`(" for line in lines):
        return " ".join(lines)
    return paragraph


class TextStream:
    """An endless stream of batches. Each epoch joins and orders the documents anew."""

    def __init__(self, tokenizer: LlamaTokenizer, plan: TrainingPlan) -> None:
        self.tokenizer = tokenizer
        self.plan = plan
        self.documents = corpus.training_documents()
        self.questions = [pair for d in self.documents for pair in questions(d)]
        self.random = random.Random(plan.seed)

    def batches(self, count: int) -> Iterator[Tensor]:
        """`count` batches of int64 (batch, window). An epoch uses every token at most once."""
        return itertools.islice(self._endless(), count)

    def _endless(self) -> Iterator[Tensor]:
        while True:
            window = self.plan.window
            ids = self.epoch()[self.random.randrange(window) :]
            windows = torch.tensor(ids[: len(ids) // window * window]).view(-1, window)
            order = self.random.sample(range(len(windows)), len(windows))
            for first in range(0, len(order) - self.plan.batch + 1, self.plan.batch):
                yield windows[order[first : first + self.plan.batch]]

    def epoch(self) -> list[int]:
        """The tokens of one epoch: passages and conversations in random order."""
        pieces = list(self.passages())
        wanted = sum(map(len, pieces)) * self.plan.chat_share / (1 - self.plan.chat_share)
        left = list(self.questions)
        self.random.shuffle(left)
        while wanted > 0 and left:
            pieces.append(self.conversation(left))
            wanted -= len(pieces[-1])
        self.random.shuffle(pieces)
        return [token for piece in pieces for token in piece]

    def passages(self) -> Iterator[list[int]]:
        """Runs of 3 neighbours on average, joined as in the held-out text, between BOS and EOS."""
        run: list[str] = []
        for document in self.documents:
            run.append(document.text)
            if self.random.random() < 1 / 3:
                yield [*self.tokenizer.encode(corpus.SEPARATOR.join(run)), EOS]
                run.clear()
        if run:
            yield [*self.tokenizer.encode(corpus.SEPARATOR.join(run)), EOS]

    def conversation(self, left: list[tuple[str, str]]) -> list[int]:
        """One to three turns, taken from the end of `left`, in the format of `qmix chat`."""
        turns: list[Message] = []
        for _ in range(min(self.random.randint(1, 3), len(left))):
            subject, answer = left.pop()
            if self.random.random() < 0.3:
                subject = subject.rpartition(".")[2]
            question = self.random.choice(_QUESTIONS).format(subject)
            turns += [Message("user", question), Message("assistant", answer)]
        ids = chat_template.encode(turns[:-1], self.tokenizer)
        return [*ids, *self.tokenizer.encode(turns[-1].content, add_special_tokens=False), EOS]
