"""What each method makes of the tiny model, on text that it never saw: the table and the ablations.

`python -m qmix.evals.accuracy [--rivals DIR] [--ablations] [--only NAME ...]` quantizes the tiny model by
each method on the same windows of the corpus's training split, scores every result in float32 against
the 16-bit model on the held-out split, and prints a markdown table. The checkpoints of other quantizers
in DIR (`make rivals` writes some) are scored beside them. `--ablations` takes one part after the other
out of GPTQ instead.

Scores differ with the text, which comes with Python: the record names its SHA-256. Knows the methods by
their options only.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import qmix
from qmix.errors import CheckpointError, QmixError, UsageError
from qmix.evals import corpus
from qmix.evals.quality.perplexity import Perplexity, Text, evaluate
from qmix.evals.training import tiny_model
from qmix.formats import open_checkpoint
from qmix.formats.compatibility import storage_summary
from qmix.quantize.calibrated.layer import LayerOptions
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.run import quantize_calibrated
from qmix.quantize.calibrated.windows import Calibration, calibration_windows
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.text.tokenizer import LlamaTokenizer
from qmix.weights.scheme import Recipe, Scheme

SAMPLES, SEQLEN = 128, 512
GROUPS = (128, 32)

METHODS = {
    "rtn-g128": QuantizeRequest(method="rtn", group_size=128),
    "rtn-g32": QuantizeRequest(method="rtn", group_size=32),
    "nf4": QuantizeRequest(method="nf4"),
    "gptq-g128": QuantizeRequest(method="gptq", group_size=128),
    "gptq-g128-asymmetric": QuantizeRequest(method="gptq", group_size=128, asymmetric=True),
    "gptq-g32": QuantizeRequest(method="gptq", group_size=32),
    "auto-4.25": QuantizeRequest(method="auto", bits=4.25),
    "auto-4.5": QuantizeRequest(method="auto", bits=4.5),
}
# What is changed of the defaults, one thing a row; `plain` is the paper's algorithm and no more.
ABLATIONS: dict[str, LayerOptions] = {
    "full": LayerOptions(),
    "weighting-none": LayerOptions(weighting="none"),
    "weighting-square": LayerOptions(weighting="square"),
    "no-act-order": LayerOptions(rounding=RoundingOptions(act_order=False)),
    "no-live-scales": LayerOptions(rounding=RoundingOptions(live_scales=False)),
    "no-scale-search": LayerOptions(rounding=RoundingOptions(scale_search=False)),
    "one-trial": LayerOptions(rounding=RoundingOptions(trials=1)),
    "no-refinement": LayerOptions(rounding=RoundingOptions(refine=0)),
    "no-correction": LayerOptions(correct=False),
    "plain": LayerOptions(
        weighting="none",
        correct=False,
        rounding=RoundingOptions(
            damping=0.01,
            act_order=False,
            live_scales=False,
            scale_search=False,
            trials=1,
            refine=0,
        ),
    ),
}

_HEADER = ("model", "bits/weight", "perplexity", "mean KL", "p99 KL", "top-1 agreement")


@dataclass(frozen=True)
class Variant:
    """A way to quantize; `write(source, out)` leaves a checkpoint at `out`."""

    name: str
    write: Callable[[Path, Path], object]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A quantized checkpoint against its 16-bit source.

    Attributes:
        bits_per_weight: over the quantized weights: codes, scales, and zeros if asymmetric.
        schemes: how many weights have which.
        group_size: of all of them; None if they differ, or have blocks.
        rival: whether somebody else's quantizer wrote it.
    """

    name: str
    bits_per_weight: float
    schemes: dict[str, int]
    group_size: int | None
    rival: bool
    result: Perplexity

    @property
    def kl(self) -> float:
        """Mean KL(source || this) in nats a token."""
        assert self.result.reference is not None
        return self.result.reference.kl_mean

    def cells(self) -> tuple[str, ...]:
        reference = self.result.reference
        assert reference is not None
        return (
            self.name,
            f"{self.bits_per_weight:.3f}",
            f"{self.result.perplexity:.4f}",
            f"{reference.kl_mean:.5f}",
            f"{reference.kl_p99:.4f}",
            f"{100 * reference.top1_agreement:.2f} %",
        )

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            "name": self.name,
            "rival": self.rival,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "schemes": self.schemes,
            **asdict(self.result)["reference"],
            "perplexity": self.result.perplexity,  # in place of the source's
        }


def requested(text: str, samples: int, seqlen: int) -> tuple[Variant, ...]:
    """Every method as `qmix quantize` runs it.

    Args:
        text: of the calibration.
    """

    def variant(name: str, request: QuantizeRequest) -> Variant:
        if request.calibrated:
            request = replace(request, samples=samples, seqlen=seqlen, device="cpu")
        return Variant(name, lambda source, out: quantize_checkpoint(source, out, request, text))

    return tuple(variant(name, request) for name, request in METHODS.items())


def ablated(windows: Calibration) -> tuple[Variant, ...]:
    """GPTQ at both group sizes with one part after the other taken out."""

    def variant(group: int, name: str, layer: LayerOptions) -> Variant:
        recipe = Recipe.uniform(Scheme(kind="int4", group_size=group), attention=True)
        options = CalibratedOptions(layer=layer)
        return Variant(
            f"g{group}-{name}",
            lambda source, out: quantize_calibrated(source, out, recipe, windows, options),
        )

    return tuple(
        variant(group, name, layer) for group in GROUPS for name, layer in ABLATIONS.items()
    )


def chosen(variants: Sequence[Variant], only: Sequence[str]) -> tuple[Variant, ...]:
    """Those whose names match a pattern, as of file names; all without patterns.

    Raises:
        UsageError: a pattern matches none.
    """
    for pattern in only:
        if not any(fnmatch(variant.name, pattern) for variant in variants):
            raise UsageError(
                "no such row",
                where="--only",
                expected=", ".join(variant.name for variant in variants),
                found=pattern,
            )
    return tuple(
        variant
        for variant in variants
        if not only or any(fnmatch(variant.name, pattern) for pattern in only)
    )


def rival_directories(parent: Path) -> tuple[Path, ...]:
    """Every checkpoint directory in `parent`, by name.

    Raises:
        CheckpointError: there is none.
    """
    found = tuple(sorted(path.parent for path in parent.glob("*/config.json")))
    if not found:
        raise CheckpointError(
            "no checkpoints",
            where=str(parent),
            expected="a directory of checkpoint directories",
            remedy="make rivals writes some to .oracles/rivals.",
        )
    return found


def score(
    name: str, directory: Path, text: Text, source: Path, *, rival: bool, window: int | None = None
) -> Score:
    """Score a quantized checkpoint in float32 on a CPU.

    Args:
        window: tokens; default: the model's positions, at most 2048.

    Raises:
        CheckpointError: damaged, another tokenizer's than the source's, or not quantized.
    """
    checkpoint = open_checkpoint(directory)
    schemes = storage_summary(checkpoint.metadata).schemes
    weights = [
        (schemes[tensor.prefix], math.prod(tensor.shape))
        for tensor in checkpoint.tensors
        if tensor.linear and schemes[tensor.prefix].kind != "dense"
    ]
    if not weights:
        raise CheckpointError(
            "not quantized", where=str(directory), expected="4- or 8-bit weights", found="none"
        )
    total = sum(count for _, count in weights)
    groups = {scheme.group_size if scheme.integer else None for scheme, _ in weights}
    mixed = len({scheme.bits for scheme, _ in weights}) > 1 or len(groups) > 1
    names = [str(scheme) for scheme, _ in weights]
    result = evaluate(
        directory, text, reference=source, dtype="float32", device="cpu", window=window
    )
    return Score(
        name=name,
        bits_per_weight=sum(scheme.bits_per_weight * count for scheme, count in weights) / total,
        schemes={scheme: names.count(scheme) for scheme in sorted(set(names))},
        group_size=None if mixed else groups.pop(),
        rival=rival,
        result=result,
    )


def to_beat(ours: Score, scores: Sequence[Score]) -> Score | None:
    """The rival of least KL at the same group size; for mixed schemes at the fewest bits not below."""
    rivals = [other for other in scores if other.rival]
    if ours.group_size is not None:
        rivals = [other for other in rivals if other.group_size == ours.group_size]
    elif len(ours.schemes) > 1:
        above = [o for o in rivals if o.bits_per_weight >= ours.bits_per_weight - 1e-9]
        least = min((other.bits_per_weight for other in above), default=0.0)
        rivals = [other for other in above if other.bits_per_weight == least]
    else:
        rivals = []
    return min(rivals, key=lambda other: other.kl, default=None)


def table(scores: Sequence[Score]) -> str:
    """All scores as a markdown table, the 16-bit model first."""
    header: tuple[str, ...] = _HEADER
    base = scores[0].result.reference
    assert base is not None
    rows: list[tuple[str, ...]] = [("bf16", "16.000", f"{base.perplexity:.4f}", "-", "-", "-")]
    rows += [one.cells() for one in scores]
    if any(one.rival for one in scores):
        rivals = [None if one.rival else to_beat(one, scores) for one in scores]
        ratios = [
            f"{one.kl / other.kl:.2f}" if other else "-"
            for one, other in zip(scores, rivals, strict=True)
        ]
        header += ("KL over the best rival's",)
        rows = [(*row, cell) for row, cell in zip(rows, ("-", *ratios), strict=True)]
    return markdown(header, rows)


def ablation_table(scores: Sequence[Score]) -> str:
    """The ablations as a markdown table, each KL over that of all parts together."""
    full = {one.group_size: one.kl for one in scores if one.name.endswith("-full")}
    rows = []
    for one in scores:
        base = full.get(one.group_size)
        ratio = "-" if base is None else f"{one.kl / base:.3f}"
        rows.append((*one.cells(), ratio))
    return markdown(("GPTQ", *_HEADER[1:], "KL over full"), rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def record(
    scores: Sequence[Score], windows: Calibration, command: str, body: str
) -> dict[str, Any]:
    """What was measured and on what, as JSON; nothing of the machine but the number of threads."""
    first = scores[0].result
    assert first.reference is not None
    documents = []
    for one in scores:
        other = None if one.rival else to_beat(one, scores)
        against = {"rival_to_beat": other.name, "ratio": one.kl / other.kl} if other else {}
        documents.append({**one.to_dict(), **against})
    return {
        "command": command,
        "versions": {
            "qmix": qmix.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "text": {
            "sha256": first.text_sha256,
            "tokens": first.tokens,
            "protocol": first.protocol,
            "bf16_perplexity": first.reference.perplexity,
        },
        "calibration": {
            "text_sha256": windows.text_sha256,
            "windows": windows.ids.shape[0],
            "tokens_a_window": windows.ids.shape[1],
        },
        "scores": documents,
        "table": body.splitlines(),
    }


def _say(words: str) -> None:
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def _measured(
    variants: Sequence[Variant], rivals: Sequence[Path], source: Path, text: Text
) -> list[Score]:
    found = []

    def add(one: Score) -> None:
        _say(f"{one.name}: mean KL {one.kl:.5f}, perplexity {one.result.perplexity:.4f}")
        found.append(one)

    for directory in rivals:
        add(score(directory.name, directory, text, source, rival=True))
    for variant in variants:
        _say(f"{variant.name}: quantizing")
        with tempfile.TemporaryDirectory() as scratch:
            begun = time.process_time()
            out = Path(scratch) / variant.name
            variant.write(source, out)
            _say(f"{variant.name}: {time.process_time() - begun:.0f} s of processor time; scoring")
            add(score(variant.name, out, text, source, rival=False))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qmix.evals.accuracy", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--rivals", type=Path, metavar="DIR", help="score its checkpoints too")
    parser.add_argument("--ablations", action="store_true", help="of GPTQ, instead of the methods")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows; * matches all")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=SEQLEN, help="tokens of each")
    parser.add_argument("--json", action="store_true", help="print the record, not the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record there too")
    return parser


def _command(options: argparse.Namespace) -> str:
    words = ["python -m qmix.evals.accuracy"]
    words += ["--ablations"] if options.ablations else []
    words += ["--rivals DIR"] if options.rivals else []
    words += ["--only", *options.only] if options.only else []
    return " ".join([*words, f"--samples {options.samples} --seqlen {options.seqlen}"])


def run(options: argparse.Namespace) -> None:
    """Measure, then print.

    Raises:
        QmixError: no such row, no checkpoints at `rivals`, too little text, or a damaged checkpoint.
    """
    if options.ablations and options.rivals:
        raise UsageError("the ablations are compared with no rival", where="--rivals")
    if options.out and not options.out.parent.is_dir():
        raise UsageError("no such directory", where="--out", found=str(options.out.parent))
    source, training = tiny_model.directory(), corpus.training_text()
    encode = LlamaTokenizer.from_pretrained(source).encode
    windows = calibration_windows(training, encode, samples=options.samples, seqlen=options.seqlen)
    everything = (
        ablated(windows)
        if options.ablations
        else requested(training, options.samples, options.seqlen)
    )
    variants = chosen(everything, options.only)
    rivals = rival_directories(options.rivals) if options.rivals else ()
    scores = _measured(variants, rivals, source, Text.of(corpus.heldout_text()))
    body = ablation_table(scores) if options.ablations else table(scores)
    document = record(scores, windows, _command(options), body)
    written = json.dumps(document, indent=2) + "\n"
    if options.out:
        options.out.write_text(written, encoding="utf-8")
    if options.json:
        sys.stdout.write(written)
        return
    sys.stdout.write(body)
    text, calibrated_on = document["text"], document["calibration"]
    sys.stdout.write(
        f"\n{text['tokens']} tokens in float32; {text['protocol']}; text sha256 {text['sha256']}; "
        f"calibration of {calibrated_on['windows']} x {calibrated_on['tokens_a_window']} tokens, text "
        f"sha256 {calibrated_on['text_sha256']}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        run(options)
    except QmixError as error:
        _say(f"accuracy: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
