"""`qmix demo`: quantize the tiny Mixtral, show what 4 bits cost, and stream a sample of its text.

Knows nothing of how a report is drawn.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import qmix
from qmix.evals.quality.measure import compare_nf4
from qmix.evals.training import tiny_model
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.printable import escaped, printable
from qmix.quantize.report import QuantizeReport

PROMPT = "Return a new list containing"
NEW_TOKENS = 96


def show_demo(
    out: Path | None, console: Console, draw_report: Callable[[QuantizeReport, Path], None]
) -> None:
    """Quantize, evaluate and sample the tiny model.

    Args:
        out: where the 4-bit checkpoint is kept; None keeps it nowhere.
        draw_report: prints the report of a quantization.
    """
    tiny = tiny_model.directory()
    with tempfile.TemporaryDirectory() as scratch:
        target = out or Path(scratch) / "tiny-nf4"
        console.print(
            f"1. quantize {escaped(tiny)} to 4 bits, and score both on held-out text ...",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        comparison = compare_nf4(target)
        draw_report(comparison.report, target)
        console.print("2. what the 4 bits cost, on text the model never saw:")
        header, *rows = comparison.rows()
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print(
            f"   {comparison.result.tokens} tokens; {comparison.result.protocol}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        console.print("3. the 4-bit model writes (it is tiny: expect grammar, not sense):")
        _sample(target)
    argument = out if out is not None else "OUT, after: qmix quantize evals/tiny OUT"
    console.print(f"Next: qmix chat {escaped(argument)}", markup=False, highlight=False)


def _sample(directory: Path) -> None:
    model, tokenizer = qmix.load(directory, device="cpu")
    ids = tokenizer.encode(PROMPT)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        top_p=0.95,
        seed=0,
        eos_token_id=model.generation_config.eos_token_id,
    )
    sys.stdout.write(PROMPT)
    for token in stream(model, GenerationInputs(torch.tensor([ids]), config, tokenizer=tokenizer)):
        sys.stdout.write(printable(token.texts[0]))
        sys.stdout.flush()
    sys.stdout.write("\n")
