"""The README.md of a quantized checkpoint: a model card in Hugging Face's form.

Says what was done and measured, and how to use it. The same run writes the same bytes, so it holds
no times. Knows nothing of how a weight is rounded.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qmix.printable import escaped
from qmix.quantities import counted, gigabytes, weights
from qmix.quantize.report import QuantizeReport
from qmix.quantize.source_card import License

PAGE = "qmix_report.html"
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@[0-9a-f]+)?", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_METHODS = {
    "nf4": "NF4 of bitsandbytes, rounded to nearest",
    "fp4": "FP4 of bitsandbytes, rounded to nearest",
    "rtn": "integers, rounded to nearest",
    "gptq": "integers by GPTQ, each layer fitted to the unrounded model on calibration text",
    "auto": "integers by GPTQ, the bits of each matrix chosen by what its rounding costs in KL",
}


def model_card(
    name: str,
    source: str,
    report: QuantizeReport,
    facts: Mapping[str, Any],
    license: License | None,
    version: str,
) -> str:
    """The card as markdown.

    Args:
        name: of the checkpoint's folder.
        source: what it was made from, as people call it: a folder's name or ORG/NAME@COMMIT.
        facts: what the manifest states besides; `calibration` and `adapter` are described.
        license: of the source; None if its card states none.
        version: of qmix.
    """
    repository = _REPOSITORY.fullmatch(source)
    words = _METHODS.get(report.method, report.method)
    merged = (
        f", with the LoRA {_code(facts['adapter']['name'])} merged" if "adapter" in facts else ""
    )
    folder = name if _PLAIN.fullmatch(name) else "DIR"
    original = source.partition("@")[0] if repository else "SRC"
    return "\n".join(
        [
            *_front_matter(None if repository is None else repository[1], report, license),
            "",
            f"# {_code(name)}",
            "",
            f"{_code(source)}{merged}, in {report.bits_per_weight:.2f} bits a weight: {words}. Made "
            f"by qmix {version}, `qmix quantize --method {report.method}`.",
            "",
            f"{weights(report.parameters)} weights, {gigabytes(report.bytes_out)} "
            f"({gigabytes(report.bytes_in)} before).",
            "",
            *_kinds(report),
            "",
            *_calibration(facts),
            "## What is measured here",
            "",
            "The relative error is `|W - Q(W)| / |W|` over all weights of a kind, in the Frobenius "
            "norm; the output error is the same of a matrix's outputs over the calibration tokens. "
            f"[{PAGE}]({PAGE}) shows both by layer. Perplexity and KL divergence depend on a text, "
            "and are not measured while quantizing:",
            "",
            *_shell(f"qmix eval {folder} --data TEXT --reference {original}"),
            "",
            *_use(folder),
            *_license_words(license),
            "",
        ]
    )


def _front_matter(
    repository: str | None, report: QuantizeReport, license: License | None
) -> Iterable[str]:
    """The YAML. JSON's strings are YAML's too, whatever they hold."""
    yield "---"
    if repository is not None:
        yield f"base_model: {json.dumps(repository)}"
        yield "base_model_relation: quantized"
    else:
        yield "# base_model: the source was a folder; name its repository on the hub here"
    if license is not None:
        yield f"license: {json.dumps(license.identifier)}"
        if license.name is not None:
            yield f"license_name: {json.dumps(license.name)}"
        if license.link is not None:
            yield f"license_link: {json.dumps(license.link)}"
    yield "pipeline_tag: text-generation"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("mixtral", "moe", "qmix", "quantized", report.method))
    yield "---"


def _kinds(report: QuantizeReport) -> Iterable[str]:
    yield "| tensors | stored as | count | weights | bits/weight | relative error | output error |"
    yield "|---|---|---|---|---|---|---|"
    for kind in report.kinds():
        error = f"{kind.relative_error:.4f}" if kind.relative_error else "-"
        output = "-" if kind.output_error is None else f"{kind.output_error:.4f}"
        yield (
            f"| {kind.kind} | {kind.scheme} | {kind.tensors} | {weights(kind.parameters)} | "
            f"{kind.bits_per_weight:.3f} | {error} | {output} |"
        )


def _calibration(facts: Mapping[str, Any]) -> Sequence[str]:
    settings = facts.get("calibration")
    if settings is None:
        return ()
    return (
        "## Calibration",
        "",
        f"{counted(settings['samples'], 'window')} of {counted(settings['seqlen'], 'token')} from a "
        "text of SHA-256 "
        f"{_code(settings['text_sha256'])}.",
        "",
    )


def _use(folder: str) -> Sequence[str]:
    commands = _shell(
        f"qmix chat {folder}",
        f"qmix plan {folder}      # what fits this machine",
        f"qmix verify {folder}    # every file and every number",
        f"qmix inspect {folder}   # which other programs load it",
    )
    return ("## Use", "", *commands, "")


def _shell(*commands: str) -> Sequence[str]:
    return ("```sh", *commands, "```")


def _license_words(license: License | None) -> Sequence[str]:
    if license is None:
        words = "The source's card states no license that could be carried over; ask its authors."
    else:
        stated = license.name or license.identifier
        words = f"The license is the source's: {_code(stated)}, as its card states it."
    return ("## License", "", words)


def _code(text: str) -> str:
    """Text as code of markdown, in which nothing is markup, whatever backticks it holds."""
    text = escaped(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
