"""The tiny model beside its quantized self on held-out text: what the guard and the demo show."""

from dataclasses import dataclass
from pathlib import Path

from qmix.evals import corpus, tiny_model
from qmix.evals.perplexity import Perplexity, Text, evaluate
from qmix.quantize import pipeline
from qmix.quantize.report import Report
from qmix.scheme import NF4, Recipe


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One quantized checkpoint against its source.

    Attributes:
        report: of the quantization. result: of the 4-bit model, with the source as its reference.
    """

    report: Report
    result: Perplexity

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The table: a header, the 16-bit row, the 4-bit row."""
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
                f"{sum(tensor.bytes_out for tensor in self.report.tensors) / 1e6:.2f}",
                f"{self.report.bits_per_weight:.2f}",
                f"{self.result.perplexity:.4f}",
                f"{reference.kl_mean:.5f}",
                f"{reference.kl_p99:.4f}",
                f"{100 * reference.top1_agreement:.2f} %",
            ),
        )


def compare(out: Path) -> Comparison:
    """Quantize the tiny model to NF4 at `out`, then score both on the held-out text."""
    tiny = tiny_model.directory()
    recipe = Recipe.uniform(NF4, attention=True)
    report = pipeline.run(tiny, out, recipe, method="nf4")
    text = Text.of(corpus.heldout_text())
    result = evaluate(out, text, reference=tiny, device="cpu")
    return Comparison(report=report, result=result)
