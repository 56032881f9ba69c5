"""The quality guard: the tiny model's perplexity and divergence against `baselines.json`.

`python -m qmix.evals.guard` prints the table and exits 5 on a regression; `--write` replaces the
baselines (a commit of its own, with the reason). The held-out text comes with Python and differs
between its versions; on another text than the baselines' the wider tolerance applies, and is named.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qmix import strict_json
from qmix.errors import QmixError, QualityError
from qmix.evals.measure import Comparison, compare

BASELINES = Path(__file__).resolve().parent / "baselines.json"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is guarded: the 16-bit perplexity, the 4-bit one's ratio to it, KL and agreement."""

    bf16_perplexity: float
    nf4_ratio: float
    nf4_kl_mean: float
    nf4_kl_p99: float
    nf4_top1_agreement: float

    @classmethod
    def of(cls, comparison: Comparison) -> "Figures":
        reference = comparison.result.reference
        assert reference is not None
        return cls(
            bf16_perplexity=reference.perplexity,
            nf4_ratio=comparison.result.perplexity / reference.perplexity,
            nf4_kl_mean=reference.kl_mean,
            nf4_kl_p99=reference.kl_p99,
            nf4_top1_agreement=reference.top1_agreement,
        )


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far each figure may move for the worse (perplexity: either way), relative to its baseline.

    Measured on one machine and text the figures repeat to 1e-6; other processors round matrix
    products differently, which moved them by less than a tenth of `same_text`.
    """

    bf16_perplexity: float
    nf4_ratio: float
    nf4_kl_mean: float
    nf4_kl_p99: float
    nf4_top1_agreement: float


SAME_TEXT = Tolerance(
    bf16_perplexity=0.005,
    nf4_ratio=0.005,
    nf4_kl_mean=0.05,
    nf4_kl_p99=0.10,
    nf4_top1_agreement=0.01,
)
OTHER_TEXT = Tolerance(
    bf16_perplexity=0.25,
    nf4_ratio=0.02,
    nf4_kl_mean=0.25,
    nf4_kl_p99=0.35,
    nf4_top1_agreement=0.03,
)


def check(found: Figures, baseline: Figures, tolerance: Tolerance) -> tuple[str, ...]:
    """Every figure that is worse than its baseline by more than the tolerance, in words."""
    failures = []
    for name, base in asdict(baseline).items():
        value, slack = getattr(found, name), getattr(tolerance, name) * base
        low = base - slack if name in ("bf16_perplexity", "nf4_top1_agreement") else float("-inf")
        high = base + slack if name != "nf4_top1_agreement" else float("inf")
        if not low <= value <= high:
            failures.append(f"{name} is {value:.6f}, baseline {base:.6f} ± {slack:.6f}")
    return tuple(failures)


def guard(comparison: Comparison) -> str:
    """Compare with the baselines; returns which tolerance held.

    Raises:
        QualityError: a regression, each figure named.
    """
    document = strict_json.read(BASELINES)
    baseline = Figures(**document["figures"])
    same = comparison.result.text_sha256 == document["text_sha256"]
    failures = check(Figures.of(comparison), baseline, SAME_TEXT if same else OTHER_TEXT)
    if failures:
        raise QualityError(
            "quality has regressed",
            where=str(BASELINES),
            found="; ".join(failures),
            remedy="Find the cause; change a baseline only in a commit of its own, with the reason.",
        )
    if same:
        return "same text as the baselines: narrow tolerance"
    return f"another text than the baselines' (Python {document['python']}): wide tolerance"


def markdown(comparison: Comparison) -> str:
    """The comparison as a markdown table, the README's."""
    header, *rows = comparison.rows()
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.guard", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the baselines")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            comparison = compare(Path(scratch) / "tiny-nf4")
        sys.stdout.write(markdown(comparison))
        sys.stdout.write(
            f"\n{comparison.result.tokens} tokens; {comparison.result.protocol}; "
            f"text sha256 {comparison.result.text_sha256}\n"
        )
        if options.write:
            document = {
                "python": ".".join(map(str, sys.version_info[:3])),
                "text_sha256": comparison.result.text_sha256,
                "figures": asdict(Figures.of(comparison)),
            }
            BASELINES.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            return 0
        sys.stdout.write(f"guard passed; {guard(comparison)}\n")
    except QmixError as error:
        sys.stderr.write(f"guard: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
