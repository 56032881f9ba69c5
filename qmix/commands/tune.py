"""`qmix tune`: search for the fastest launches on this GPU, for the shapes of one checkpoint.

What is found is kept for every later run; see qmix.generation.tuner. Heavy imports stay inside the
functions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import ResourceError, UnsupportedError, UsageError
from qmix.printable import escaped
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix import MixtralForCausalLM
    from qmix.generation.tuner import Found, Tuner


@options.grouped
def tune(
    directory: options.Directory,
    full: Annotated[
        bool, typer.Option("--full", help="Search for minutes, through more choices.")
    ] = False,
    as_json: options.AsJson = False,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Find the fastest launches on this GPU, and keep them.

    The first reply on a GPU does the same for 20 s; QMIX_TUNE=0 turns that off.

    Examples:
      qmix tune mixtral-nf4
      qmix tune mixtral-nf4 --full
    """
    from qmix import MixtralForCausalLM
    from qmix.commands.load_bar import load_bar
    from qmix.generation.tuner import Tuner

    parsed = load.parse()
    if parsed.device.type != "cuda":
        raise UsageError(
            "only a GPU is tuned", where="device", expected="cuda", found=parsed.device.type
        )
    directory = sources.local(directory, yes=yes)
    with load_bar() as bar:
        model = MixtralForCausalLM.from_pretrained(directory, load_options=parsed, progress=bar)
    report = search_all(model, Tuner(), full=full)
    terminal.print_result(report.text(), report.to_dict(), as_json=as_json)


@dataclass(frozen=True)
class TuneReport:
    """What was found for each number of rows."""

    found: tuple["Found", ...]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        return {"tunings": [dict(_document(each)) for each in self.found]}

    def text(self) -> str:
        """A line for each number of rows."""
        return "".join(f"{escaped(_line(each))}\n" for each in self.found)


def search_all(model: "MixtralForCausalLM", tuner: "Tuner", *, full: bool) -> TuneReport:
    """Search for each number of rows that has choices of its own.

    Raises:
        UnsupportedError: the model's decode steps are not launched by our kernels alone.
        ResourceError: not all experts fit the GPU, or it was lost.
    """
    from qmix.generation.packed_layers import supported
    from qmix.generation.tuner import BATCHES, key_of

    decoder, head = model.model, model.lm_head
    if model.store is not None:
        raise ResourceError(
            "the experts do not all fit the GPU, and copies would be timed with the launches",
            remedy="What is found with a model that fits serves this one if their shapes are equal.",
        )
    if not supported(decoder):
        raise UnsupportedError(
            "decode steps of this model are not launched by our kernels alone",
            remedy="qmix doctor says which backend multiplies, and why.",
        )
    device = decoder.norm.weight.device
    return TuneReport(
        tuple(
            tuner.search(decoder, head, rows, key_of(decoder, rows, device), full=full)
            for rows in BATCHES
        )
    )


def _document(found: "Found") -> Iterator[tuple[str, object]]:
    from qmix.tuning import axes

    assert found.entry is not None
    yield "shapes", found.entry.key.shapes
    yield "tuning", dict(found.entry.tuning)
    yield "changes", axes.changes(found.tuning)
    yield "microseconds", found.entry.microseconds
    yield "untuned_microseconds", found.entry.untuned
    yield "rejected", {axes.changes(each): why for each, why in found.rejected.items()}


def _line(found: "Found") -> str:
    from qmix.tuning import axes

    assert found.entry is not None
    entry, rejected = found.entry, len(found.rejected)
    gain = 100 * (1 - entry.microseconds / entry.untuned)
    failed = f"; {counted(rejected, 'choice')} failed" if rejected else ""
    return f"{entry.key.shapes}: {gain:.1f} % faster with {axes.changes(found.tuning)}{failed}"
