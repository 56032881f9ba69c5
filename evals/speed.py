"""The table of GPU speeds in docs/speed.md, from the records of the acceptance command alone.

`python -m qmix.evals.speed` prints it; `--write` puts it between the page's `<!-- speed -->` marks.
If there are several records of one GPU, the newest counts. Knows nothing of how they were measured.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError
from qmix.evals import markdown
from qmix.evals.command import exit_code

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "evals" / "records"
PAGE = ROOT / "docs" / "speed.md"
MARKS = ("<!-- speed -->\n", "<!-- /speed -->\n")
NOTHING = "Nothing has been measured on a GPU yet.\n"

_GIB = 2**30
_LAYERS = 32
# (test, batch, label) of the model's results that the table shows.
_DECODE = (
    ("tg64", 1, "decode, batch 1"),
    ("tg64 T0.7", 1, "decode, batch 1, sampled"),
    ("tg64 @ d4096", 1, "decode, batch 1, after 4k"),
    ("tg64 @ d32768", 1, "decode, batch 1, after 32k"),
    ("tg64", 8, "decode, batch 8"),
    ("tg64", 16, "decode, batch 16"),
)
_PREFILL = (("pp512", 1, "prefill of 512"), ("pp4096", 1, "prefill of 4k"))


def records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The newest acceptance record of each GPU, ordered by the GPU's name.

    Raises:
        CheckpointError: a file is not a record.
    """
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-acceptance.json")):
        record = strict_json.read(path)
        if not isinstance(record, dict) or not isinstance(record.get("steps"), dict):
            raise CheckpointError("not a record of qmix.evals.gpu", where=str(path))
        if record.get("gpu"):
            newest[record["gpu"]] = path, record
    return [newest[gpu] for gpu in sorted(newest)]


def speed_table(folder: Path = RECORDS) -> str:
    """A markdown table for each GPU, or the sentence that there is none."""
    header = ("", "measured", "of the copy bandwidth", "best peer in the same run")
    parts = []
    for path, record in records(folder):
        rows = list(_rows(record))
        if not rows:
            continue
        versions = record["versions"]
        parts.append(
            f"**{record['gpu']}**, {record['date'][:10]}, torch {versions['torch']}, "
            f"triton {versions['triton']} (`{path.name}`)\n\n{markdown.table(header, rows)}"
        )
    return "\n".join(parts) or NOTHING


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    steps = record["steps"]
    copied = next(
        (
            result["gigabytes_per_second"]
            for result in _results(steps, "bandwidth")
            if result.get("what") == "copy"
        ),
        None,
    )
    if copied is not None:
        yield "memory, copied", f"{copied:,.0f} GB/s", "", ""
    for result in _results(steps, "experts"):
        tokens = result.get("tokens")
        if tokens in (1, 8, 1024) and "microseconds" in result:
            bound = ""
            if copied is not None and tokens <= 16:
                bound = f"{100 * result['gigabytes_per_second'] / copied:.0f} %"
            label = f"experts of a layer, M={tokens}, {result['kernel'].removeprefix('qmix ')}"
            yield label, f"{result['microseconds']:.1f} us", bound, _best_peer(steps, tokens)
    for weights in ("nf4", "int4"):
        yield from _model_rows(steps, weights)


def _model_rows(steps: dict[str, Any], weights: str) -> Iterator[tuple[str, str, str, str]]:
    """The whole model with weights of one format; one of fewer layers says so."""
    tests = {
        (each.get("test"), each.get("batch")): each
        for name in sorted(steps, key=lambda name: "untuned" not in name)  # what is tuned counts
        for each in _results(steps, name)
        if each.get("weights") == weights
    }
    for test, batch, label in (*_DECODE, *_PREFILL):
        result = tests.get((test, batch), {})
        if "tokens_per_second" in result:
            bound = f"{100 * result['of_bound']:.0f} %" if result.get("of_bound") else ""
            part = (
                "" if result["layers"] == _LAYERS else f", {result['layers']} of {_LAYERS} layers"
            )
            rate = f"{result['tokens_per_second']:,.0f} tok/s"
            yield f"{weights}, {label}{part}", rate, bound, ""
    for test, context in (("tg64 @ d4096", "4k"), ("tg64 @ d32768", "32k")):
        result = tests.get((test, 1), {})
        if "peak_bytes" in result:
            peak = f"{result['peak_bytes'] / _GIB:.1f} GiB"
            yield f"{weights}, peak memory, {context} of context", peak, "", ""


def _best_peer(steps: dict[str, Any], tokens: int) -> str:
    """The fastest peer at this number of tokens."""
    timed = [
        result
        for name in steps
        if name.startswith("peer ")
        for result in _results(steps, name)
        if result.get("tokens") == tokens and "microseconds" in result
    ]
    if not timed:
        return ""
    best = min(timed, key=lambda result: float(result["microseconds"]))
    return f"{best['kernel']}: {best['microseconds']:.1f} us, {best['bits_per_weight']:g} bits"


def _results(steps: dict[str, Any], name: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = steps.get(name, {}).get("results", [])
    return results


def with_table(text: str, table: str) -> str:
    """The text with `table` between its marks.

    Raises:
        CheckpointError: the text has no marks.
    """
    before, opening, rest = text.partition(MARKS[0])
    _, closing, after = rest.partition(MARKS[1])
    if not opening or not closing:
        raise CheckpointError(
            "no place for the speed table", where=str(PAGE), expected=" and ".join(MARKS)
        )
    return before + opening + table + closing + after


def _print(*, write: bool) -> None:
    table = speed_table()
    if write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")
    else:
        sys.stdout.write(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.speed", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write it into docs/speed.md")
    options = parser.parse_args(arguments)
    return exit_code("speed", lambda: _print(write=options.write))


if __name__ == "__main__":
    sys.exit(main())
