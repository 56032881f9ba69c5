"""`qmix compare`: several versions of a model beside each other, as one page of HTML.

What is measured is in qmix.evals; heavy imports stay inside the functions.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import UsageError
from qmix.quantities import gigabytes

if TYPE_CHECKING:
    from qmix.evals.quality.comparison import Comparison

_NAME = 32  # columns

Models = Annotated[
    list[Path],
    typer.Argument(metavar="MODEL...", help="Folders, GGUF files, or ORG/NAME of the hub."),
]


Out = Annotated[
    Path, typer.Option(metavar="FILE", help="The page: a new .html file.", show_default=False)
]
Reference = Annotated[
    Path | None, typer.Option(help="The model to measure from.", show_default="the first MODEL")
]
Bench = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Speeds to show: qmix bench --json; may be repeated."),
]


def compare(
    models: Models,
    data: options.ScoredText,
    out: Out,
    reference: Reference = None,
    bench: Bench = None,
    ctx: options.ScoredWindow = None,
    raw_text: options.RawText = False,
    force: options.Force = False,
    as_json: options.AsJson = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    yes: options.Yes = False,
) -> None:
    """Draw what versions of a model cost, as one page of HTML.

    Size against perplexity and KL; where in the text and in the model they differ; the worst
    tokens; which experts are used; bits by matrix.

    \b
    Examples:
      qmix compare Mixtral-8x7B-v0.1 mixtral-nf4 --data wiki.raw --out report.html
      qmix compare nf4 gptq --reference bf16 --data my.txt --out two.html
    """
    from qmix.evals.report.compare_page import check_count
    from qmix.pages import output_file

    output_file.check(out, (output_file.PAGE,), force=force)
    given = _ordered(models, reference)
    check_count(len(given))
    directories = [sources.local(path, yes=yes) for path in given]
    from qmix.evals.quality import comparison, texts
    from qmix.evals.report.compare_page import compare_page
    from qmix.evals.report.recorded_speed import read_speeds
    from qmix.files import atomic_file
    from qmix.pages import page

    speeds = [speed for path in bench or () for speed in read_speeds(path)]
    text = texts.read_text(data, as_it_is=raw_text)
    terminal.notice_changes(data, text.changes, "--raw-text keeps them")
    with terminal.progress() as show:
        show("tokenizing", 0, 0)
        result = comparison.compare(
            directories, text, window=ctx, dtype=dtype, device=device, progress=show
        )
    atomic_file.write(out, page.html(compare_page(result, data.name, speeds)))
    terminal.print_result(_text(result), result.to_dict(), as_json=as_json)
    terminal.message(f"the page: {out} ({gigabytes(out.stat().st_size)})")


def _ordered(models: list[Path], reference: Path | None) -> list[Path]:
    """The models, the reference first.

    Raises:
        UsageError: one is given twice.
    """
    if reference is not None:
        models = [reference, *(path for path in models if path != reference)]
    if len(set(models)) < len(models):
        raise UsageError("a model is given twice", found=", ".join(map(str, models)))
    return models


def _text(result: "Comparison") -> str:
    lines = [f"{'':{_NAME}} {'size':>9} {'bits':>7} {'perplexity':>11} {'mean KL':>9} {'top-1':>8}"]
    names = terminal.cells([model.name for model in result.models], _NAME)
    for name, model in zip(names, result.models, strict=True):
        other = model.score.reference
        compared = f"{'-':>9} {'-':>8}"
        if other is not None:
            compared = f"{other.kl_mean:9.5f} {100 * other.top1_agreement:6.2f} %"
        lines.append(
            f"{name} {gigabytes(model.nbytes):>9} {model.bits_per_weight:7.3f} "
            f"{model.score.perplexity:11.4f} {compared}"
        )
    return "\n".join(lines) + "\n"
