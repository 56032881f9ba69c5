"""Trains the tiny Mixtral of `evals/tiny` through the project's own model class, on evals.corpus.

`python -m qmix.evals.training.train_tiny OUT [--steps N] [--seed S]`. The number of steps and the
seed are fixed, so that the same command gives the same model. Knows nothing of 4 bits.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qmix.errors import QualityError, UsageError
from qmix.evals import corpus
from qmix.evals.command import exit_code, say
from qmix.evals.training.plan import TrainingPlan
from qmix.evals.training.tiny_checkpoint import model_card, save_tiny
from qmix.evals.training.train_tokenizer import train_tokenizer
from qmix.evals.training.trainer import WORKERS, Trainer

LEAST_LOAD = 0.05  # of a layer's routes; 0.125 is perfect balance


def build_tiny(out: Path, plan: TrainingPlan) -> None:
    """Train and save, and fail if an expert is starved.

    Raises:
        UsageError: `out`, or what an earlier run left beside it, exists.
        QualityError: an expert gets less than LEAST_LOAD of a layer's routes; nothing is written.
    """
    for path in (out, out.with_name(out.name + ".partial")):
        if path.exists():
            raise UsageError("already exists", where=str(path), remedy="Name another directory.")
    begun = time.monotonic()
    tokenizer_bytes = train_tokenizer(corpus.training_text())
    trainer = Trainer(plan, tokenizer_bytes)
    score = trainer.train()
    say(str(score))
    for layer, row in enumerate(score.expert_loads):
        say(f"layer {layer}: " + " ".join(f"{load:.3f}" for load in row))
    if score.least_load < LEAST_LOAD:
        raise QualityError(
            "an expert is starved",
            expected=f"at least {LEAST_LOAD:.0%} of a layer's routes",
            found=f"{score.least_load:.1%}",
            remedy="Raise router_aux_loss_coef or train longer.",
        )
    wall, cpu = (time.monotonic() - begun) / 60, time.process_time() / 60
    minutes = f"{wall:.0f} minutes of wall time, {cpu:.0f} of processor time over {WORKERS} threads"
    card = model_card(plan, score, trainer.model, minutes)
    save_tiny(trainer.model, tokenizer_bytes, card, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m qmix.evals.training.train_tiny", description=__doc__
    )
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--steps", type=int, default=TrainingPlan.steps)
    parser.add_argument("--seed", type=int, default=TrainingPlan.seed)
    options = parser.parse_args(arguments)
    plan = TrainingPlan(steps=options.steps, seed=options.seed)
    return exit_code("train_tiny", lambda: build_tiny(options.out, plan))


if __name__ == "__main__":
    sys.exit(main())
