"""What each method makes of the tiny model, on text that the model never saw: table and ablations.

`python -m qmix.evals.accuracy [--rivals DIR] [--ablations] [--only NAME ...]` quantizes the tiny
model by each method on the same windows of the corpus's training split. It scores every result in
float32 against the 16-bit model on the held-out split and prints a markdown table. The checkpoints
of other quantizers in DIR (`make rivals` writes some) are scored beside them, and with `--llama
PYTHON` what llama.cpp makes of the same model in its types of 2 to 4 bits (`make llama`).
`--ablations` instead leaves out one part of GPTQ after another, and tries each alone. `--overfit`
scores on the calibration text too: how much higher KL is on the held-out text, beside a method that
needs no calibration, shows what was fitted too closely. `--calibrations C` calibrates each method C
times, on parts of the training text that have no document in common, and adds a row of their mean.
`--budgets BITS ...` sets the KL that `auto` predicts at each budget beside what is measured, and
`--picture FILE` draws both.

Scores differ with the text, which comes with Python, so the record names its SHA-256.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import qmix
from qmix import strict_json
from qmix.errors import UsageError
from qmix.evals import corpus
from qmix.evals.command import exit_code, say
from qmix.evals.quality.budgets import (
    budget_documents,
    budget_table,
    check_budgets,
    fit,
    score_budgets,
)
from qmix.evals.quality.calibrations import averaged
from qmix.evals.quality.llama_quantizers import quantized
from qmix.evals.quality.scores import (
    VariantScore,
    ablation_table,
    kl_ratio,
    rival_directories,
    rival_to_beat,
    score_each,
    score_table,
)
from qmix.evals.quality.texts import Text
from qmix.evals.quality.variants import Variant, ablated_variants, matching, method_variants
from qmix.evals.report.budget_chart import ALT, budget_chart
from qmix.evals.training import tiny_model
from qmix.gguf.files import is_gguf
from qmix.pages import output_file
from qmix.quantize.calibrated.windows import Calibration, calibration_windows
from qmix.text.tokenizer import LlamaTokenizer

SAMPLES, SEQLEN = 128, 512


def record(
    scores: Sequence[VariantScore], calibration: Calibration, command: str, body: str
) -> dict[str, Any]:
    """What was measured, and on what, as JSON; of the machine only the number of threads."""
    first = scores[0].result
    documents = []
    for each in scores:
        rival = None if each.rival else rival_to_beat(each, scores)
        document = each.to_dict()
        if rival:
            ratio = kl_ratio(each, rival)
            document |= {"rival_to_beat": rival.name, "ratio": ratio.value}
            document["ratio_interval"] = None if ratio.interval is None else asdict(ratio.interval)
        documents.append(document)
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
            "bf16_perplexity": scores[0].reference.perplexity,
        },
        "calibration": {
            "text_sha256": calibration.text_sha256,
            "windows": calibration.ids.shape[0],
            "tokens_a_window": calibration.ids.shape[1],
        },
        "scores": documents,
        "table": body.splitlines(),
    }


def _scores(
    variants: Sequence[Variant],
    rivals: Sequence[Path],
    source: Path,
    text: Text,
    calibration: Calibration | None,
) -> list[VariantScore]:
    scores: list[VariantScore] = []

    def add(each: VariantScore) -> None:
        say(f"{each.name}: mean KL {each.kl:.5f}, perplexity {each.result.perplexity:.4f}")
        scores.append(each)

    if rivals:
        named = {path.stem if is_gguf(path) else path.name: path for path in rivals}
        for each in score_each(named, text, source, rival=True, calibration=calibration):
            add(each)
    with tempfile.TemporaryDirectory() as scratch:
        written = {variant.name: Path(scratch) / variant.name for variant in variants}
        for variant in variants:
            begun = time.process_time()
            say(f"{variant.name}: quantizing")
            variant.write(source, written[variant.name])
            say(f"{variant.name}: {time.process_time() - begun:.0f} s of processor time")
        if written:  # together, so that the source is run once
            say("scoring")
            for each in score_each(written, text, source, rival=False, calibration=calibration):
                add(each)
    return scores


def _calibrated_again(
    chosen: Sequence[Variant], options: argparse.Namespace, source: Path, text: Text
) -> list[VariantScore]:
    """The scores of each method on several calibration texts, and their mean."""
    scores = []
    parts = corpus.training_parts(options.calibrations)
    lists = [method_variants(part, options.samples, options.seqlen) for part in parts]
    for variant in chosen:
        each = [
            replace(matching(variants, [variant.name])[0], name=f"{variant.name} {number}")
            for number, variants in enumerate(lists, 1)
        ]
        found = _scores(each, (), source, text, None)
        scores += [*found, averaged(f"{variant.name}, mean of {len(parts)}", found)]
    return scores


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qmix.evals.accuracy", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "--rivals", type=Path, metavar="DIR", help="score the checkpoints in DIR too"
    )
    parser.add_argument(
        "--llama",
        type=Path,
        metavar="PYTHON",
        help="score llama.cpp's types, with llama-cpp-python of PYTHON",
    )
    parser.add_argument(
        "--ablations", action="store_true", help="compare GPTQ without its parts, not the methods"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="rows to measure; * matches all"
    )
    parser.add_argument("--overfit", action="store_true", help="score on the calibration text too")
    parser.add_argument(
        "--calibrations", type=int, default=1, metavar="C", help="texts to calibrate on"
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=[],
        metavar="BITS",
        help="compare what auto predicts with what is measured",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw that as FILE.svg or FILE.png"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=SEQLEN, help="tokens of each window")
    parser.add_argument("--json", action="store_true", help="print the record, not the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the record to FILE")
    return parser


def _command(options: argparse.Namespace) -> str:
    words = ["python -m qmix.evals.accuracy"]
    words += ["--ablations"] if options.ablations else []
    words += ["--overfit"] if options.overfit else []
    words += ["--rivals DIR"] if options.rivals else []
    words += ["--llama PYTHON"] if options.llama else []
    words += ["--only", *options.only] if options.only else []
    words += ["--budgets", *(f"{bits:g}" for bits in options.budgets)] if options.budgets else []
    words += [f"--calibrations {options.calibrations}"] if options.calibrations > 1 else []
    return " ".join([*words, f"--samples {options.samples} --seqlen {options.seqlen}"])


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is computed."""
    if options.calibrations > 1 and (options.ablations or options.overfit):
        raise UsageError("the methods alone are calibrated again", where="--calibrations")
    for name in ("rivals", "llama"):
        if options.ablations and getattr(options, name):
            raise UsageError("the ablations are compared with no rival", where=f"--{name}")
    if options.budgets:
        for name in ("ablations", "rivals", "llama", "only", "overfit"):
            if getattr(options, name):
                raise UsageError("does not apply to --budgets", where=f"--{name}")
        if options.calibrations > 1:
            raise UsageError("does not apply to --budgets", where="--calibrations")
        check_budgets(options.budgets)
    if options.picture:
        if not options.budgets:
            raise UsageError("applies to --budgets only", where="--picture")
        output_file.check(options.picture, output_file.PICTURES, force=True, where="--picture")
    if options.out and not options.out.parent.is_dir():
        raise UsageError("no such directory", where="--out", found=str(options.out.parent))


def measure(options: argparse.Namespace) -> None:
    """Measure, print, then write the record.

    Raises:
        QmixError: no such row, no checkpoints in `rivals`, too little text, or a damaged
        checkpoint.
    """
    _check(options)
    again = options.calibrations > 1
    source, training = tiny_model.directory(), corpus.training_text()
    encode = LlamaTokenizer.from_pretrained(source).encode
    calibration = calibration_windows(
        training, encode, samples=options.samples, seqlen=options.seqlen
    )
    heldout = Text.of(corpus.heldout_text())
    if options.budgets:
        _compare_budgets(options, source, calibration, heldout)
        return
    variants = (
        ablated_variants(calibration)
        if options.ablations
        else method_variants(training, options.samples, options.seqlen)
    )
    chosen = matching(variants, options.only)
    rivals = rival_directories(options.rivals) if options.rivals else ()
    fitted = calibration if options.overfit else None
    with tempfile.TemporaryDirectory() as scratch:
        if options.llama:
            files = quantized(options.llama, source, Path(scratch), calibration, say=say)
            rivals = (*rivals, *files)
        scores = _scores(() if again else chosen, rivals, source, heldout, fitted)
    if again:
        scores += _calibrated_again(chosen, options, source, heldout)
    body = ablation_table(scores) if options.ablations else score_table(scores)
    _finish(record(scores, calibration, _command(options), body), options)


def _compare_budgets(
    options: argparse.Namespace, source: Path, calibration: Calibration, heldout: Text
) -> None:
    """What `auto` predicts, and what is measured."""
    scores = score_budgets(options.budgets, source, calibration, heldout, say=say)
    line = fit(scores)
    body = f"{budget_table(scores)}\n{line}"
    document = record([each.score for each in scores], calibration, _command(options), body)
    _finish(document | {"budgets": budget_documents(scores), "fit": asdict(line)}, options)
    if options.picture:
        output_file.write_picture(options.picture, budget_chart(scores), ALT)


def _finish(document: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print, then write the record."""
    sys.stdout.write(json.dumps(document, indent=2) + "\n" if options.json else _table(document))
    if options.out:
        strict_json.write(options.out, document)


def _table(document: Mapping[str, Any]) -> str:
    text, calibrated_on = document["text"], document["calibration"]
    lines = (
        *document["table"],
        "",
        f"{text['tokens']} tokens in float32; {text['protocol']}; text sha256 {text['sha256']}; "
        f"calibration on {calibrated_on['windows']} x {calibrated_on['tokens_a_window']} tokens, "
        f"text sha256 {calibrated_on['text_sha256']}",
    )
    return "".join(f"{line}\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    options = _parser().parse_args(arguments)
    return exit_code("accuracy", lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
