"""The training loop: gradients of single sequences, summed in a fixed order, and held-out scores.

Knows nothing of files.
"""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.evals import corpus
from qmix.evals.command import say
from qmix.evals.training.plan import CONFIG, TrainingPlan
from qmix.evals.training.text_stream import TextStream
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.losses import load_balancing_loss
from qmix.text.tokenizer import LlamaTokenizer

WORKERS = 2  # threads; they change the speed only


@dataclass(frozen=True, kw_only=True)
class HeldoutScore:
    """How well the model predicts the held-out text, and with which experts.

    Attributes:
        loss: mean cross-entropy in nats a token.
        tokens: number of tokens that were predicted.
        expert_loads: share of each layer's routes that went to each expert; a layer sums to 1.
    """

    loss: float
    tokens: int
    expert_loads: list[list[float]]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def least_load(self) -> float:
        """The smallest share of any expert."""
        return min(min(layer) for layer in self.expert_loads)

    def __str__(self) -> str:
        return (
            f"held-out loss {self.loss:.4f}  perplexity {self.perplexity:.3f}"
            f"  least share of an expert {self.least_load:.3f}"
        )


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of one sequence by parameter, and its losses."""

    values: tuple[Tensor, ...]
    loss: float
    aux_loss: float


def gradients(model: MixtralForCausalLM, row: Tensor) -> Gradients:
    """Gradients of next-token loss and auxiliary losses of a sequence, int64 (1, window)."""
    out = model(input_ids=row, labels=row, output_router_logits=True, use_cache=False)
    coefficient = model.config.router_aux_loss_coef
    loss = out.loss + coefficient * _layer_balance(out.router_logits, model.config)
    parameters = list(model.parameters())
    values = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    aux_loss = out.aux_loss.item()
    return Gradients(values, out.loss.item() - coefficient * aux_loss, aux_loss)


def _layer_balance(router_logits: tuple[Tensor, ...], config: MixtralConfig) -> Tensor:
    """The auxiliary loss of each layer on its own, averaged.

    Hugging Face's auxiliary loss takes all layers together, so layers may starve different experts:
    with it alone, 6 of 24 experts had under 3 % of the routes after 120 steps, at a perfect loss of
    2.0.
    """
    layers = [
        load_balancing_loss((logits,), config.num_experts_per_tok) for logits in router_logits
    ]
    return torch.stack(layers).mean()


class Trainer:
    """A model, its optimizer and its workers.

    Each sequence is processed by one thread from end to end, and gradients are added in the order
    of the batch. The weights therefore do not depend on the number of cores, and no thread waits
    inside an operation (on a busy machine two threads an operation had a third of this speed).
    """

    def __init__(self, plan: TrainingPlan, tokenizer_bytes: bytes) -> None:
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

    def train(self) -> HeldoutScore:
        """Take all steps of the plan, then round the weights to bfloat16 (stored in float32)."""
        plan, started, seen = self.plan, time.monotonic(), 0
        for step, ids in enumerate(TextStream(self.tokenizer, plan).batches(plan.steps), start=1):
            loss, aux_loss = self.step(step - 1, ids)
            seen += ids.numel()
            if step % plan.report_every == 0:
                elapsed = time.monotonic() - started
                say(
                    f"step {step}/{plan.steps}  loss {loss:.3f}  aux {aux_loss:.3f}"
                    f"  {seen / elapsed:.0f} tok/s"
                    f"  ETA {(plan.steps - step) * elapsed / step / 60:.1f} min"
                )
            if step % plan.score_every == 0 and step < plan.steps:
                say(str(self.score()))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.bfloat16())
        return self.score()

    def step(self, step: int, ids: Tensor) -> tuple[float, float]:
        """Update once from int64 (batch, window); returns its mean loss and auxiliary loss."""
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

    def score(self) -> HeldoutScore:
        """Score the held-out text: one BOS, windows side by side, the tail dropped."""
        self.model.eval()
        window = self.plan.window
        ends = range(window, len(self.heldout) + 1, window)
        rows = [torch.tensor([self.heldout[end - window : end]]) for end in ends]
        scores = list(self.workers.map(lambda row: _score(self.model, row), rows))
        if not scores:
            raise UsageError(
                "the held-out text is shorter than one window",
                expected=f"{window} tokens",
                found=len(self.heldout),
            )
        counts = torch.stack([routes for _, routes in scores]).sum(0)
        loads = (counts / counts.sum(-1, keepdim=True)).tolist()
        loss = sum(loss for loss, _ in scores) / len(scores)
        return HeldoutScore(loss=loss, tokens=len(scores) * (window - 1), expert_loads=loads)


@torch.no_grad()
def _score(model: MixtralForCausalLM, row: Tensor) -> tuple[float, Tensor]:
    """The mean loss of a window, and how often each layer chose each expert (layers, experts)."""
    config = model.config
    out = model(input_ids=row, labels=row, output_router_logits=True, use_cache=False)
    loss = out.loss - config.router_aux_loss_coef * out.aux_loss
    routes = [r.topk(config.num_experts_per_tok, -1).indices for r in out.router_logits]
    counts = [torch.bincount(r.flatten(), minlength=config.num_local_experts) for r in routes]
    return loss.item(), torch.stack(counts)
