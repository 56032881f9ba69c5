"""The tiny model beside its quantized self on held-out text, for the guard and the demo.

GPTQ is calibrated with little text, so that guarding it takes seconds. Its figures tell whether the
solver still does what it did, not how good it is; qmix.evals.accuracy tells that. Knows nothing of
baselines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix.evals import corpus
from qmix.evals.quality.evaluation import evaluate
from qmix.evals.quality.perplexity import Perplexity
from qmix.evals.quality.texts import Text
from qmix.evals.training import tiny_model
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.run import quantize_calibrated
from qmix.quantize.calibrated.windows import calibration_windows
from qmix.quantize.report import QuantizeReport
from qmix.quantize.source import open_source
from qmix.quantize.streaming import quantize_streaming
from qmix.text.tokenizer import LlamaTokenizer
from qmix.weights.scheme import NF4, Recipe, Scheme

SAMPLES, SEQLEN = 16, 256


@dataclass(frozen=True, kw_only=True)
class QualityComparison:
    """A quantized checkpoint against its source.

    Attributes:
        report: of the quantization.
        result: of the 4-bit model, with the source as its reference.
        calibration_sha256: of the calibration text; None without calibration.
    """

    report: QuantizeReport
    result: Perplexity
    calibration_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Both reports as a JSON document."""
        return {"quantization": self.report.to_dict(), "evaluation": self.result.to_dict()}

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """A table: the header, the 16-bit row, the 4-bit row."""
        reference = self.result.reference
        assert reference is not None
        return (
            ("", "MB", "bits/weight", "perplexity", "mean KL", "p99 KL", "top-1 agreement"),
            (
                "bf16",
                f"{self.report.bytes_in / 1e6:.2f}",
                "16.00",
                f"{reference.perplexity:.4f}",
                "-",
                "-",
                "-",
            ),
            (
                self.report.method.upper(),
                f"{self.report.bytes_out / 1e6:.2f}",
                f"{self.report.bits_per_weight:.2f}",
                f"{self.result.perplexity:.4f}",
                f"{reference.kl_mean:.5f}",
                f"{reference.kl_p99:.4f}",
                f"{100 * reference.top1_agreement:.2f} %",
            ),
        )


def compare_nf4(
    out: Path, *, progress: Callable[[str, float, float], None] = lambda *_: None
) -> QualityComparison:
    """Quantize the tiny model to NF4 at `out`, and score both on the held-out text.

    Args:
        progress: called with (what is done now, layers scored, layers to score).
    """
    recipe = Recipe.uniform(NF4, attention=True)
    progress("quantizing", 0, 1)
    report = quantize_streaming(tiny_model.directory(), out, recipe, method="nf4")
    return QualityComparison(report=report, result=_scored(out, progress))


def compare_gptq(out: Path) -> QualityComparison:
    """The same by GPTQ in groups of 128, calibrated on 16 x 256 tokens of the training text."""
    tiny = tiny_model.directory()
    encode = LlamaTokenizer.from_pretrained(tiny).encode
    windows = calibration_windows(corpus.training_text(), encode, samples=SAMPLES, seqlen=SEQLEN)
    recipe = Recipe.uniform(Scheme(kind="int4", group_size=128), attention=True)
    report = quantize_calibrated(open_source(tiny), out, recipe, windows, CalibratedOptions())
    return QualityComparison(
        report=report, result=_scored(out), calibration_sha256=windows.text_sha256
    )


def _scored(
    directory: Path, progress: Callable[[str, float, float], None] = lambda *_: None
) -> Perplexity:
    return evaluate(
        directory,
        Text.of(corpus.heldout_text()),
        reference=tiny_model.directory(),
        device="cpu",
        progress=lambda done, total: progress("scoring", done, total),
    )
