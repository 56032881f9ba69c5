"""The table of GPU speeds in docs/speed.md, from the records of the acceptance command alone.

`python -m qmix.evals.speed` prints it; `--write` puts it between the page's `<!-- speed -->` marks.
If there are several records of one GPU, the newest counts.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "evals" / "records"
PAGE = ROOT / "docs" / "speed.md"
MARKS = ("<!-- speed -->\n", "<!-- /speed -->\n")
NOTHING = "Nothing has been measured on a GPU yet.\n"

_GIB = 2**30
# Tests of the model that the table shows: as they are named, rows, and what is said of them.
_DECODE = (
    ("tg64", 1, "decode, batch 1"),
    ("tg64 @ d4096", 1, "decode, batch 1, after 4k"),
    ("tg64 @ d32768", 1, "decode, batch 1, after 32k"),
    ("tg64", 8, "decode, batch 8"),
    ("tg64", 16, "decode, batch 16"),
)
_PREFILL = (("pp512", 1, "prefill of 512"), ("pp4096", 1, "prefill of 4k"), ("pp16384", 1, "prefill of 16k"))  # fmt: skip


def records(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The acceptance records with a GPU in them, the newest of each, by its name.

    Raises:
        CheckpointError: a record that is none.
    """
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-acceptance.json")):
        record = strict_json.read(path)
        if not isinstance(record, dict) or not isinstance(record.get("steps"), dict):
            raise CheckpointError("not a record of qmix.evals.gpu", where=str(path))
        if record.get("gpu"):
            newest[record["gpu"]] = path, record
    return [newest[gpu] for gpu in sorted(newest)]


def table(folder: Path = RECORDS) -> str:
    """Markdown: a table a GPU, or that there is none."""
    parts = []
    for path, record in records(folder):
        rows = list(_rows(record))
        if not rows:
            continue
        header = ("", "measured", "of the copy bandwidth", "best peer in the same run")
        lines = [header, tuple("---" for _ in header), *rows]
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        versions = record["versions"]
        parts.append(
            f"**{record['gpu']}**, {record['date'][:10]}, torch {versions['torch']}, "
            f"triton {versions['triton']} (`{path.name}`)\n\n{body}\n"
        )
    return "\n".join(parts) or NOTHING


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    steps = record["steps"]
    copied = next(
        (
            r["gigabytes_per_second"]
            for r in _results(steps, "bandwidth")
            if r.get("what") == "copy"
        ),
        None,
    )
    if copied is not None:
        yield "memory, copied", f"{copied:,.0f} GB/s", "", ""
    for result in _results(steps, "moe"):
        if result.get("tokens") in (1, 8, 1024) and "microseconds" in result:
            bound = ""
            if copied is not None and result["tokens"] <= 16:
                bound = f"{100 * result['gigabytes_per_second'] / copied:.0f} %"
            what = f"experts of a layer, M={result['tokens']}, {result['kernel'].removeprefix('qmix ')}"
            yield what, f"{result['microseconds']:.1f} us", bound, _peer(steps, result["tokens"])
    model = {(r.get("test"), r.get("batch")): r for r in _results(steps, "model")}
    for test, batch, what in (*_DECODE, *_PREFILL):
        found = model.get((test, batch), {})
        if "tokens_per_second" not in found:
            continue
        bound = f"{100 * found['of_bound']:.0f} %" if found.get("of_bound") else ""
        yield what, f"{found['tokens_per_second']:,.0f} tok/s", bound, ""
    for test, what in (("tg64 @ d4096", "4k"), ("tg64 @ d32768", "32k")):
        found = model.get((test, 1), {})
        if "peak_bytes" in found:
            yield f"peak memory, {what} of context", f"{found['peak_bytes'] / _GIB:.1f} GiB", "", ""


def _peer(steps: dict[str, Any], tokens: int) -> str:
    """The fastest of the others at as many tokens."""
    timed = [
        result
        for result in _results(steps, "peers")
        if result.get("tokens") == tokens and "microseconds" in result
    ]
    if not timed:
        return ""
    best = min(timed, key=lambda result: float(result["microseconds"]))
    return f"{best['kernel']}: {best['microseconds']:.1f} us, {best['bits_per_weight']:g} bits"


def _results(steps: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = steps.get(name, {}).get("results", [])
    return found


def written(text: str, body: str) -> str:
    """The text with `body` between its marks.

    Raises:
        CheckpointError: no marks.
    """
    before, opening, rest = text.partition(MARKS[0])
    _, closing, after = rest.partition(MARKS[1])
    if not opening or not closing:
        raise CheckpointError(
            "no place for the speed table", where=str(PAGE), expected=" and ".join(MARKS)
        )
    return before + opening + body + closing + after


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.speed", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/speed.md")
    options = parser.parse_args(arguments)
    try:
        body = table()
        if options.write:
            PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), body), encoding="utf-8")
        else:
            sys.stdout.write(body)
    except QmixError as error:
        sys.stderr.write(f"speed: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
