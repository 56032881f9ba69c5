"""Trains the tiny Mixtral of `evals/tiny` through the project's own model class, on the corpus of evals/corpus.py.

A fixed number of steps from a seed, so that one command gives one model. Knows nothing of 4 bits.
"""

import argparse
import itertools
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import QmixError, QualityError, UsageError
from qmix.evals import corpus
from qmix.evals.training.train_tokenizer import BOS, EOS, VOCABULARY, train_tokenizer
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.losses import load_balancing_loss
from qmix.text import chat_template
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer

CONFIG = MixtralConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rope_theta=1e4,  # at 1e6 most of the 16 rotary pairs would not turn within 1024 positions
    initializer_range=0.04,
    router_aux_loss_coef=0.02,
    bos_token_id=BOS,
    eos_token_id=EOS,
    dtype="bfloat16",
)
WORKERS = 2  # threads; changes the speed only
LEAST_SHARE = 0.05  # of a layer's routes; 0.125 is perfect balance
SHARD_BYTES = 5_000_000  # three shards, so that every reader of the directory meets an index
ANSWER_CHARS = 150  # a shorter first paragraph takes the next one with it

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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the model is trained; with the corpus, all that the weights depend on."""

    steps: int = 3000
    seed: int = 0
    batch: int = 2  # 4 at half the steps ended 0.4 nats worse after 0.5 M tokens
    window: int = CONFIG.max_position_embeddings
    peak_rate: float = 2e-3
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    chat_share: float = 0.15  # of the tokens: questions and answers in the [INST] format
    report_every: int = 50
    score_every: int = 500

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth of the peak."""
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well the held-out text is predicted, and by which experts.

    Attributes:
        loss: mean cross-entropy of a token, in nats.
        tokens: how many were predicted.
        shares: of each layer's routes that went to each expert; a layer sums to 1.
    """

    loss: float
    tokens: int
    shares: list[list[float]]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def least_share(self) -> float:
        return min(min(layer) for layer in self.shares)


def questions(document: corpus.Document) -> Iterator[tuple[str, str]]:
    """(subject, first words about it): a topic, or every object and member that says something."""
    kind, _, name = document.name.partition(":")
    paragraphs = document.paragraphs
    if kind == "topic":
        prose = (p for p in paragraphs if p[:1].isalpha() and "***" not in p and len(p) >= 60)
        answer = next(prose, None)
        if answer:
            yield name.replace("-", " "), _unwrapped(answer)
        return
    for at, heading in enumerate(paragraphs):
        if _is_heading(heading, at):
            answer = _first_words(paragraphs[at + 1 :])
            if answer:
                yield heading.partition("(")[0], answer


def _is_heading(paragraph: str, at: int) -> bool:
    """`module.name(arguments)`, as the corpus writes it; a lone word is one only at the top."""
    return bool(_HEADING.fullmatch(paragraph)) and (at == 0 or bool({".", "("} & set(paragraph)))


def _first_words(paragraphs: Sequence[str]) -> str:
    """Paragraphs up to the next heading until they make an answer."""
    taken: list[str] = []
    for paragraph in paragraphs[:3]:
        if _is_heading(paragraph, 1) or sum(map(len, taken)) >= ANSWER_CHARS:
            break
        taken.append(_unwrapped(paragraph))
    return "\n\n".join(taken)


def _unwrapped(paragraph: str) -> str:
    """Prose on one line; whatever is indented or listed keeps its lines."""
    lines = paragraph.split("\n")
    if all(line[:1].isalnum() or line[:1] in "\"'`(" for line in lines):
        return " ".join(lines)
    return paragraph


class Stream:
    """Batches of training tokens without end; each epoch joins and orders the documents anew."""

    def __init__(self, tokenizer: LlamaTokenizer, plan: Plan) -> None:
        self.tokenizer = tokenizer
        self.plan = plan
        self.documents = corpus.training_documents()
        self.questions = [pair for d in self.documents for pair in questions(d)]
        self.random = random.Random(plan.seed)

    def batches(self, count: int) -> Iterator[Tensor]:
        """`count` times int64 (batch, window), every token of an epoch at most once."""
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
        """Neighbours joined as in the held-out text, in runs of 3 on average between BOS and EOS."""
        run: list[str] = []
        for document in self.documents:
            run.append(document.text)
            if self.random.random() < 1 / 3:
                yield [*self.tokenizer.encode(corpus.JOINT.join(run)), EOS]
                run.clear()
        if run:
            yield [*self.tokenizer.encode(corpus.JOINT.join(run)), EOS]

    def conversation(self, left: list[tuple[str, str]]) -> list[int]:
        """One to three turns taken off `left`, in the format that `qmix chat` speaks."""
        turns: list[Message] = []
        for _ in range(min(self.random.randint(1, 3), len(left))):
            subject, answer = left.pop()
            if self.random.random() < 0.3:
                subject = subject.rpartition(".")[2]
            question = self.random.choice(_QUESTIONS).format(subject)
            turns += [Message("user", question), Message("assistant", answer)]
        ids = chat_template.encode(turns[:-1], self.tokenizer)
        return [*ids, *self.tokenizer.encode(turns[-1].content, add_special_tokens=False), EOS]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one sequence asks of the weights, and the losses it showed."""

    values: tuple[Tensor, ...]
    loss: float
    aux_loss: float


def gradients(model: MixtralForCausalLM, row: Tensor) -> Gradients:
    """Of the next-token loss and the auxiliary losses of one sequence, int64 (1, window)."""
    out = model(input_ids=row, labels=row, output_router_logits=True, use_cache=False)
    coefficient = model.config.router_aux_loss_coef
    loss = out.loss + coefficient * _layer_balance(out.router_logits, model.config)
    parameters = list(model.parameters())
    values = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    aux_loss = out.aux_loss.item()
    return Gradients(values, out.loss.item() - coefficient * aux_loss, aux_loss)


def _layer_balance(router_logits: tuple[Tensor, ...], config: MixtralConfig) -> Tensor:
    """The auxiliary loss of each layer by itself, averaged.

    The reference page's takes all layers together, so layers may starve different experts: with it
    alone 6 of 24 experts had under 3 % of the routes after 120 steps, at a perfect loss of 2.0.
    """
    layers = [load_balancing_loss((one,), config.num_experts_per_tok) for one in router_logits]
    return torch.stack(layers).mean()


class Trainer:
    """A model, its optimizer and its workers.

    Every sequence is one thread's work from end to end, and gradients are added in the order of the
    batch: the weights do not depend on the number of cores, and no thread waits inside an operation
    (on a busy machine two threads an operation were measured at a third of this speed).
    """

    def __init__(self, plan: Plan, tokenizer_bytes: bytes) -> None:
        torch.manual_seed(plan.seed)
        torch.set_num_threads(1)
        self.plan = plan
        self.tokenizer = LlamaTokenizer(tokenizer_bytes)
        self.heldout = self.tokenizer.encode(corpus.heldout_text())
        self.model = MixtralForCausalLM(CONFIG)
        self.workers = ThreadPoolExecutor(WORKERS)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": plan.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=plan.peak_rate,
            betas=plan.betas,
            fused=True,
        )

    def train(self) -> Score:
        """All steps of the plan; the weights end rounded to bfloat16 (held in float32)."""
        plan, started, seen = self.plan, time.monotonic(), 0
        for step, ids in enumerate(Stream(self.tokenizer, plan).batches(plan.steps), start=1):
            loss, aux_loss = self.step(step - 1, ids)
            seen += ids.numel()
            if step % plan.report_every == 0:
                elapsed = time.monotonic() - started
                _say(
                    f"step {step}/{plan.steps}  loss {loss:.3f}  aux {aux_loss:.3f}"
                    f"  {seen / elapsed:.0f} tok/s"
                    f"  ETA {(plan.steps - step) * elapsed / step / 60:.1f} min"
                )
            if step % plan.score_every == 0 and step < plan.steps:
                _say(_verdict(self.score()))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.bfloat16())
        return self.score()

    def step(self, step: int, ids: Tensor) -> tuple[float, float]:
        """One update from int64 (batch, window); the mean loss and auxiliary loss before it."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(step)
        rows = [ids[row : row + 1] for row in range(len(ids))]
        parts = list(self.workers.map(lambda row: gradients(self.model, row), rows))
        columns = zip(*(part.values for part in parts), strict=True)
        for parameter, column in zip(self.model.parameters(), columns, strict=True):
            parameter.grad = torch.stack(column).mean(0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip_norm)
        self.optimizer.step()
        count = len(parts)
        return sum(p.loss for p in parts) / count, sum(p.aux_loss for p in parts) / count

    def score(self) -> Score:
        """Held-out text by convention A: one BOS, windows side by side, the tail dropped."""
        self.model.eval()
        window = self.plan.window
        ends = range(window, len(self.heldout) + 1, window)
        rows = [torch.tensor([self.heldout[end - window : end]]) for end in ends]
        scored = list(self.workers.map(lambda row: _score(self.model, row), rows))
        if not scored:
            raise UsageError(
                "the held-out text is shorter than one window",
                expected=f"{window} tokens",
                found=len(self.heldout),
            )
        counts = torch.stack([routes for _, routes in scored]).sum(0)
        shares = (counts / counts.sum(-1, keepdim=True)).tolist()
        loss = sum(loss for loss, _ in scored) / len(scored)
        return Score(loss=loss, tokens=len(scored) * (window - 1), shares=shares)


@torch.no_grad()
def _score(model: MixtralForCausalLM, row: Tensor) -> tuple[float, Tensor]:
    """Mean loss over one window, and how often each layer chose each expert (layers, experts)."""
    config = model.config
    out = model(input_ids=row, labels=row, output_router_logits=True, use_cache=False)
    loss = out.loss - config.router_aux_loss_coef * out.aux_loss
    routes = [r.topk(config.num_experts_per_tok, -1).indices for r in out.router_logits]
    counts = [torch.bincount(r.flatten(), minlength=config.num_local_experts) for r in routes]
    return loss.item(), torch.stack(counts)


def _verdict(result: Score) -> str:
    return (
        f"held-out loss {result.loss:.4f}  perplexity {result.perplexity:.3f}"
        f"  least share of an expert {result.least_share:.3f}"
    )


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def save(model: MixtralForCausalLM, tokenizer_bytes: bytes, card: str, out: Path) -> None:
    """The directory as the hub has Mixtral-8x7B's, written beside `out` and renamed at the end."""
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True)
    model.bfloat16().save_pretrained(partial, max_shard_bytes=SHARD_BYTES)
    (partial / "tokenizer.model").write_bytes(tokenizer_bytes)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    strict_json.write(
        partial / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS}
    )
    strict_json.write(partial / "special_tokens_map.json", specials)
    strict_json.write(
        partial / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "additional_special_tokens": [],
            **specials,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": model.config.max_position_embeddings,
            "pad_token": None,
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
        },
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(out)


def model_card(plan: Plan, result: Score, model: MixtralForCausalLM, minutes: str) -> str:
    training, heldout = corpus.training_text(), corpus.heldout_text()
    parameters = sum(p.numel() for p in model.parameters())
    seen = plan.steps * plan.batch * plan.window
    experts = range(model.config.num_local_experts)
    layers = [
        f"| {layer} | " + " | ".join(f"{100 * share:.1f}" for share in row) + " |"
        for layer, row in enumerate(result.shares)
    ]
    lines = [
        "# A tiny Mixtral",
        "",
        f"{parameters / 1e6:.2f} M parameters ({2 * parameters / 1e6:.1f} MB in bfloat16), trained from scratch on",
        "the text that every Python carries: pydoc's topics and the docstrings of the standard library",
        "(Python Software Foundation License). It exists so that every change to qmix is measured on a",
        "really trained mixture of experts. It writes like a docstring, knows little, and should not be",
        "asked for facts.",
        "",
        "| | |",
        "|---|---|",
        f"| held-out perplexity | **{result.perplexity:.3f}** (loss {result.loss:.4f} nats a token, {result.tokens} tokens) |",
        f"| protocol | one BOS, windows of {plan.window} side by side, tail dropped; weights rounded to bfloat16, arithmetic in float32 |",
        f"| tokens seen | {seen:,} ({plan.steps} steps of {plan.batch} x {plan.window}) |",
        f"| seed | {plan.seed} |",
        f"| command | `python -m qmix.evals.training.train_tiny OUT --steps {plan.steps} --seed {plan.seed}` |",
        f"| Python, torch | {sys.version.split()[0]}, {torch.__version__} |",
        f"| time | {minutes}, evaluation included |",
        f"| training text | {len(training.encode()):,} bytes, sha256 `{corpus.fingerprint(training)}` |",
        f"| held-out text | {len(heldout.encode()):,} bytes, sha256 `{corpus.fingerprint(heldout)}` |",
        "",
        "Optimizer: AdamW, peak rate "
        f"{plan.peak_rate:g}, {plan.warmup_steps} steps of warm-up, cosine, weight decay {plan.weight_decay:g}, clip",
        f"{plan.clip_norm:g}; auxiliary loss with coefficient {model.config.router_aux_loss_coef:g}. {100 * plan.chat_share:.0f} % of the tokens are questions and answers",
        "made from the same docstrings, in Mixtral's `[INST]` format.",
        "",
        "The text differs between Python versions, and with it every number above; which documents are",
        "held out does not, because their names decide.",
        "",
        "Share of each layer's routes (percent of 2 a token, held-out text; even is 12.5):",
        "",
        "| layer | " + " | ".join(str(e) for e in experts) + " |",
        "|---|" + "---|" * len(experts),
        *layers,
    ]
    return "\n".join(lines) + "\n"


def build(out: Path, plan: Plan) -> None:
    """Train, save, and fail if an expert is starved.

    Raises:
        UsageError: `out`, or what an earlier run left beside it, is there.
        QualityError: an expert gets less than LEAST_SHARE of a layer's routes; nothing is written.
    """
    for path in (out, out.with_name(out.name + ".partial")):
        if path.exists():
            raise UsageError("already there", where=str(path), remedy="Name another directory.")
    started = time.monotonic()
    tokenizer_bytes = train_tokenizer(corpus.training_text())
    trainer = Trainer(plan, tokenizer_bytes)
    result = trainer.train()
    _say(_verdict(result))
    for layer, row in enumerate(result.shares):
        _say(f"layer {layer}: " + " ".join(f"{share:.3f}" for share in row))
    if result.least_share < LEAST_SHARE:
        raise QualityError(
            "an expert is starved",
            expected=f"at least {LEAST_SHARE:.0%} of a layer's routes",
            found=f"{result.least_share:.1%}",
            remedy="Raise router_aux_loss_coef or train longer.",
        )
    wall, cpu = (time.monotonic() - started) / 60, time.process_time() / 60
    minutes = f"{wall:.0f} minutes of wall time, {cpu:.0f} of processor time over {WORKERS} threads"
    card = model_card(plan, result, trainer.model, minutes)
    save(trainer.model, tokenizer_bytes, card, out)


def main(arguments: list[str]) -> int:
    """`python -m qmix.evals.training.train_tiny OUT [--steps N] [--seed S]`."""
    parser = argparse.ArgumentParser(
        prog="python -m qmix.evals.training.train_tiny", description=__doc__
    )
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    given = parser.parse_args(arguments)
    try:
        build(given.out, Plan(steps=given.steps, seed=given.seed))
    except QmixError as error:
        _say(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
