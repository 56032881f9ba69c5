"""What the commands show on stderr and stdout: progress, notices, tables. Knows no command.

Rich is imported when something is drawn, never before.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from qmix.commands.checkpoint.convert import Conversion
    from qmix.commands.checkpoint.export import Export
    from qmix.commands.checkpoint.inspect import Inventory
    from qmix.evals.quality.perplexity import Perplexity
    from qmix.quantize.report import Report

_LINE_EVERY_S = 10


def console() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def notice(text: str) -> None:
    console().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield show(what, done, total): a bar on a terminal, a line every ten seconds elsewhere."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = console()
    if not screen.is_terminal:
        yield _lines()
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def _lines() -> Callable[[str, int, int], None]:
    begun = last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_EVERY_S or not done:
            return
        last = now
        left = (now - begun) * (total - done) / done
        sys.stderr.write(f"{100 * done // total:3d} %  eta {left:.0f} s  {what}\n")
        sys.stderr.flush()

    return show


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield asked(): whether Ctrl-C or SIGTERM came; the second Ctrl-C ends the program at once."""
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        sys.stderr.write("\nending after this layer; Ctrl-C again ends at once\n")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def draw_report(report: "Report", out: Path) -> None:
    from rich.table import Table

    kinds = report.kinds()
    calibrated = any(kind.output_error is not None for kind in kinds)
    table = Table("tensors", "stored as", "count", "weights", "bits/weight", "relative error")
    if calibrated:
        table.add_column("output error")
    for kind in kinds:
        cells = [
            kind.kind,
            kind.scheme,
            str(kind.tensors),
            f"{kind.parameters / 1e6:,.2f} M",
            f"{kind.bits_per_weight:.3f}",
            f"{kind.relative_error:.4f}" if kind.relative_error else "-",
        ]
        if calibrated:
            cells.append("-" if kind.output_error is None else f"{kind.output_error:.4f}")
        table.add_row(*cells)
    screen = console()
    screen.print(table)
    screen.print(
        f"{out}: {report.bytes_in / 1e9:.3f} GB in, {report.bytes_out / 1e9:.3f} GB out, "
        f"{report.bits_per_weight:.2f} bits a weight in all, {report.seconds:.1f} s "
        f"({report.bytes_in / 1e9 / report.seconds:.3f} GB/s)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for line in report.remarks():
        notice(line)


def draw_conversion(result: "Conversion", out: Path) -> None:
    if result.ignored:
        notice(f"left aside from params.json: {', '.join(result.ignored)}")
    if result.tokenizer is None:
        notice(
            f"there is no tokenizer: put the model's tokenizer.model into {out} before you "
            "generate or chat"
        )
    elif result.tokenizer != "tokenizer.model":
        notice(f"{result.tokenizer} became tokenizer.model")
    console().print(
        f"{out}: {result.tensors} tensors, {result.parameters / 1e9:.3f} B weights in "
        f"{result.dtype}, {result.bytes_out / 1e9:.3f} GB, {result.seconds:.1f} s "
        f"({result.bytes_out / 1e9 / result.seconds:.3f} GB/s)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def draw_export(result: "Export", out: Path) -> None:
    notice(
        f"{out}: {result.weights} weights packed anew, {result.bytes_out / 1e9:.3f} GB, "
        f"{result.seconds:.1f} s ({result.bytes_out / 1e9 / result.seconds:.3f} GB/s)"
    )


def draw_perplexity(result: "Perplexity") -> None:
    lines = [
        f"perplexity  {result.perplexity:.4f} ± {result.stderr:.4f}",
        f"tokens      {result.tokens}",
        f"protocol    {result.protocol}",
        f"text        sha256 {result.text_sha256}",
    ]
    if result.reference is not None:
        other = result.reference
        lines += [
            f"reference   {other.perplexity:.4f} "
            f"(ratio {result.perplexity / other.perplexity:.4f})",
            f"KL          mean {other.kl_mean:.6f}, median {other.kl_median:.6f}, "
            f"p99 {other.kl_p99:.6f} nats",
            f"top-1       {100 * other.top1_agreement:.2f} % agree",
        ]
    sys.stdout.write("\n".join(lines) + "\n")


def draw_inventory(inventory: "Inventory") -> None:
    lines = [
        f"{part.kind:10} {part.layout:19} {part.scheme:22} {part.weights:5} tensors "
        f"{part.parameters / 1e6:12,.2f} M {part.bits_per_weight:7.3f} bits/weight"
        for part in inventory.parts
    ]
    lines.append(
        f"{len(inventory.files)} files, {inventory.stored_bytes / 1e9:.3f} GB, "
        f"{inventory.parameters / 1e9:.3f} B weights, {inventory.bits_per_weight:.3f} bits each"
    )
    for verdict in inventory.readers:
        reason = verdict.reason if verdict.tried else f"{verdict.reason} (not tried)".lstrip()
        lines.append(f"{verdict.reader:18} {verdict.outcome:8} {reason}".rstrip())
    sys.stdout.write("\n".join(lines) + "\n")
