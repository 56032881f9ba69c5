"""The quality guard: the tiny model's perplexity and divergence against `baselines.json`.

`python -m qmix.evals.guard` prints the table and exits 5 on a regression. `--write` replaces the
baselines, which is a commit of its own that states the reason. The held-out and the calibration
text come with Python and differ between its versions. On texts other than the baselines' the wider
tolerance applies, and the output says so. Knows nothing of how a model is quantized or scored.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qmix import strict_json
from qmix.errors import QualityError
from qmix.evals import markdown
from qmix.evals.command import exit_code
from qmix.evals.quality.measure import (
    SAMPLES,
    SEQLEN,
    QualityComparison,
    compare_gptq,
    compare_nf4,
)
from qmix.evals.quality.window_scores import difference

BASELINES = Path(__file__).resolve().parent / "baselines.json"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The guarded figures, or a tolerance for each of them.

    They are the 16-bit perplexity, and for NF4 and for GPTQ the ratio of the perplexity to it, the
    mean and the 99th percentile of the KL divergence, and the top-1 agreement.
    """

    bf16_perplexity: float
    nf4_ratio: float
    nf4_kl_mean: float
    nf4_kl_p99: float
    nf4_top1_agreement: float
    gptq_ratio: float
    gptq_kl_mean: float
    gptq_kl_p99: float
    gptq_top1_agreement: float

    @classmethod
    def of(cls, nf4: QualityComparison, gptq: QualityComparison) -> "Figures":
        """The figures of two comparisons."""
        base, other = nf4.result.reference, gptq.result.reference
        assert base is not None
        assert other is not None
        return cls(
            bf16_perplexity=base.perplexity,
            nf4_ratio=nf4.result.perplexity / base.perplexity,
            nf4_kl_mean=base.kl_mean,
            nf4_kl_p99=base.kl_p99,
            nf4_top1_agreement=base.top1_agreement,
            gptq_ratio=gptq.result.perplexity / other.perplexity,
            gptq_kl_mean=other.kl_mean,
            gptq_kl_p99=other.kl_p99,
            gptq_top1_agreement=other.top1_agreement,
        )


# How far each figure may move for the worse (perplexity: in either direction), relative to its
# baseline. On one machine and text the figures repeat to 1e-6. Other processors and other numbers
# of threads round matrix products differently, which moved NF4's by less than a tenth of SAME_TEXT.
# GPTQ turns such a difference into other codes: two threads instead of one moved its mean KL by
# 2.3 %, and its p99 by 6.7 %.
SAME_TEXT = Figures(
    bf16_perplexity=0.005,
    nf4_ratio=0.005,
    nf4_kl_mean=0.05,
    nf4_kl_p99=0.10,
    nf4_top1_agreement=0.01,
    gptq_ratio=0.005,
    gptq_kl_mean=0.08,
    gptq_kl_p99=0.20,
    gptq_top1_agreement=0.01,
)
OTHER_TEXT = Figures(
    bf16_perplexity=0.25,
    nf4_ratio=0.02,
    nf4_kl_mean=0.25,
    nf4_kl_p99=0.35,
    nf4_top1_agreement=0.03,
    gptq_ratio=0.02,
    gptq_kl_mean=0.25,
    gptq_kl_p99=0.35,
    gptq_top1_agreement=0.03,
)


def check(figures: Figures, baseline: Figures, tolerance: Figures) -> tuple[str, ...]:
    """Every figure that is worse than its baseline by more than its tolerance, in words."""
    failures = []
    for name, base in asdict(baseline).items():
        value, slack = getattr(figures, name), getattr(tolerance, name) * base
        agreement = name.endswith("top1_agreement")
        low = base - slack if agreement or name == "bf16_perplexity" else float("-inf")
        high = float("inf") if agreement else base + slack
        if not low <= value <= high:
            failures.append(f"{name} is {value:.6f}, baseline {base:.6f} ± {slack:.6f}")
    return tuple(failures)


def guard(nf4: QualityComparison, gptq: QualityComparison) -> str:
    """Compare with the baselines; returns which tolerance applied, in words.

    Raises:
        QualityError: a regression; the message names each figure.
    """
    document = strict_json.read(BASELINES)
    baseline = Figures(**document["figures"])
    same = all(document[name] == value for name, value in _texts(nf4, gptq).items())
    failures = check(Figures.of(nf4, gptq), baseline, SAME_TEXT if same else OTHER_TEXT)
    if failures:
        raise QualityError(
            "quality has regressed",
            where=str(BASELINES),
            found="; ".join(failures),
            remedy="Find the cause; change a baseline only in a commit of its own, with the reason.",
        )
    if same:
        return "same texts as the baselines: narrow tolerance"
    return f"other texts than the baselines' (Python {document['python']}): wide tolerance"


def _texts(nf4: QualityComparison, gptq: QualityComparison) -> dict[str, str | None]:
    return {
        "text_sha256": nf4.result.text_sha256,
        "calibration_sha256": gptq.calibration_sha256,
    }


def comparison_table(nf4: QualityComparison, gptq: QualityComparison) -> str:
    """Both comparisons as one markdown table."""
    header, *rows = (*nf4.rows(), gptq.rows()[-1])
    return markdown.table(header, rows)


def intervals(nf4: QualityComparison, gptq: QualityComparison) -> str:
    """What the windows of the text leave open of the figures, a line for each method."""
    lines = []
    for name, each in (("NF4", nf4.result), ("GPTQ", gptq.result)):
        found = each.reference
        assert found is not None
        if found.kl_interval is not None and found.perplexity_ratio_interval is not None:
            lines.append(
                f"{name}: mean KL {found.kl_interval.shown('.5f')}; "
                f"perplexity over bf16's {found.perplexity_ratio_interval.shown('.4f')}"
            )
    ratio = difference(gptq.result.windows, nf4.result.windows).kl_ratio
    if ratio is not None and ratio.interval is not None:
        lines.append(f"GPTQ's KL over NF4's: {ratio.shown('.3f')}")
    return "".join(f"{line}\n" for line in lines)


def run_guard(*, write: bool) -> None:
    """Quantize, score, print the table, and compare with the baselines or replace them.

    Raises:
        QualityError: a regression.
    """
    with tempfile.TemporaryDirectory() as scratch:
        nf4 = compare_nf4(Path(scratch) / "tiny-nf4")
        gptq = compare_gptq(Path(scratch) / "tiny-gptq")
    sys.stdout.write(comparison_table(nf4, gptq))
    sys.stdout.write(
        f"\n{nf4.result.tokens} tokens; {nf4.result.protocol}; "
        f"text sha256 {nf4.result.text_sha256}; GPTQ: group 128, calibrated with "
        f"{SAMPLES} x {SEQLEN} tokens\n"
    )
    sys.stdout.write(intervals(nf4, gptq))
    if write:
        document = {
            "python": ".".join(map(str, sys.version_info[:3])),
            **_texts(nf4, gptq),
            "figures": asdict(Figures.of(nf4, gptq)),
        }
        strict_json.write(BASELINES, document)
    else:
        sys.stdout.write(f"guard passed; {guard(nf4, gptq)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.guard", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the baselines")
    options = parser.parse_args(arguments)
    return exit_code("guard", lambda: run_guard(write=options.write))


if __name__ == "__main__":
    sys.exit(main())
