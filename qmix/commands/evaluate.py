"""`qmix eval`: what a checkpoint loses, on texts, on chats, and beside other checkpoints.

What is measured is in qmix.evals; heavy imports stay inside the functions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmix.commands import eval_text, options, sources, terminal
from qmix.commands.eval_sharing import KEPT, SHARING, Sharing, shared
from qmix.commands.processes import launched, prints
from qmix.errors import UsageError
from qmix.hub.local import shown_name

if TYPE_CHECKING:
    from qmix.evals.quality.evaluation import Material
    from qmix.evals.quality.perplexity import Perplexity
    from qmix.evals.quality.texts import Text

_OTHERS, _LIMITS = "Other things to score", "Quality gates"
_BATCH_SIZE = 8


@dataclass(frozen=True)
class Scored(options.Group):
    """What is scored, as written."""

    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text file to score.", show_default=False)
    ] = None
    ctx: options.ScoredWindow = None
    stride: Annotated[
        int | None,
        typer.Option(
            parser=options.token_count, help="Tokens between windows.", show_default="the window"
        ),
    ] = None
    raw_text: options.RawText = False
    chats: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of conversations whose answers are scored.",
            show_default=False,
            rich_help_panel=_OTHERS,
        ),
    ] = None
    template: options.Template = None
    needle: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Hide a number at 11 depths of --data, this often, and ask for it.",
            show_default=False,
            rich_help_panel=_OTHERS,
        ),
    ] = None
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Task file of lm_eval; may be repeated. Needs the extra lm-eval.",
            show_default=False,
            rich_help_panel=_OTHERS,
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="--tasks: requests at a time.",
            show_default=str(_BATCH_SIZE),
            rich_help_panel=_OTHERS,
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="--tasks: documents of each at most.",
            show_default="all",
            rich_help_panel=_OTHERS,
        ),
    ] = None

    def check(self) -> None:
        """
        Raises:
            UsageError: nothing is to be scored, or options contradict each other.
        """
        given = [
            name
            for name, value in (
                ("--data", self.data),
                ("--chats", self.chats),
                ("--tasks", self.tasks),
            )
            if value
        ]
        if len(given) != 1:
            raise UsageError(
                "one thing is scored at a time",
                expected="--data, --chats or --tasks",
                found=" and ".join(given) or "none of them",
            )
        refused = {
            "--ctx does not apply to --tasks": self.ctx is not None and bool(self.tasks),
            "--stride does not apply to --tasks": self.stride is not None and bool(self.tasks),
            "--batch-size needs --tasks": self.batch_size is not None and not self.tasks,
            "--limit needs --tasks": self.limit is not None and not self.tasks,
            "--template needs --chats": self.template is not None and self.chats is None,
            "--needle needs --data": self.needle is not None and self.data is None,
            "--chats takes no --stride": self.stride is not None and self.chats is not None,
            "--needle takes no --stride": self.stride is not None and self.needle is not None,
        }
        for what, is_so in refused.items():
            if is_so:
                raise UsageError(what)

    @property
    def has_perplexity(self) -> bool:
        """Whether the result is a perplexity."""
        return self.needle is None and not self.tasks

    def text(self) -> "Text":
        """The text of --data, with a notice of what was changed of it.

        Raises:
            CheckpointError: the file cannot be read.
        """
        from qmix.evals.quality.texts import read_text

        assert self.data is not None
        text = read_text(self.data, as_it_is=self.raw_text)
        terminal.notice_changes(self.data, text.changes, "--raw-text keeps them")
        return text

    def material(self) -> "Material":
        """The text of --data, or the conversations of --chats.

        Raises:
            CheckpointError: the file cannot be read.
        """
        from qmix.evals.quality.conversations import read_conversations
        from qmix.evals.quality.evaluation import WholeText

        if self.chats is not None:
            return read_conversations(self.chats, self.ctx, self.template)
        return WholeText(self.text(), self.ctx, self.stride)


@dataclass(frozen=True)
class Gates(options.Group):
    """What a result may be at most."""

    max_perplexity: Annotated[
        float | None,
        typer.Option(help="Exit 5 if the perplexity is higher.", rich_help_panel=_LIMITS),
    ] = None
    max_kl: Annotated[
        float | None,
        typer.Option(help="Exit 5 if the mean KL divergence is higher.", rich_help_panel=_LIMITS),
    ] = None


@dataclass(frozen=True)
class Computation(options.Group):
    """How models are run, as written."""

    dtype: options.Dtype = None
    device: options.Device = None
    backend: options.Backend = None
    kv: options.KV = None


@options.grouped
def evaluate(
    directory: options.Directory,
    scored: Scored = Scored(),
    reference: Annotated[
        Path | None, typer.Option(help="Unquantized checkpoint to compare with.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another version of MODEL: how the two differ.")
    ] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Show the scores by position in the window.")
    ] = False,
    gates: Gates = Gates(),
    as_json: options.AsJson = False,
    computation: Computation = Computation(),
    sharing: Sharing = SHARING,
    yes: options.Yes = False,
) -> None:
    """Measure perplexity, and the divergence from a reference model.

    Intervals come from a paired bootstrap over windows, or over conversations.

    Examples:
      qmix eval mixtral-nf4 --data wiki.test.raw --reference Mixtral-8x7B-v0.1
      qmix eval mixtral-gptq --against mixtral-nf4 --data wiki.test.raw
      qmix eval mixtral-nf4 --chats chats.jsonl --reference Mixtral-8x7B-v0.1
      qmix eval mixtral-nf4 --data book.txt --needle 5 --ctx 16k
      qmix eval mixtral-nf4 --tasks arc.yaml --against mixtral-gptq
      qmix eval mixtral-nf4 --data wiki.test.raw --processes 4 --scores scores
    """
    scored.check()
    if gates.max_kl is not None and reference is None:
        raise UsageError("--max-kl needs --reference")
    if not scored.has_perplexity and (by_position or gates != Gates()):
        raise UsageError("--needle and --tasks take no --by-position, --max-perplexity or --max-kl")
    if scored.tasks and computation.kv == "int8":
        raise UsageError("--tasks takes no --kv int8: lm_eval brings caches of its own")
    sharing.check(scored.has_perplexity)
    if scored.tasks:
        from qmix.evals.harness.extra import check_extra

        check_extra("qmix eval --tasks")
    models = [sources.local(path, yes=yes) for path in (directory, against) if path is not None]
    base = None if reference is None else sources.local(reference, yes=yes)
    everyone = models if base is None else [*models, base]
    if scored.tasks:
        shown = _tasks(everyone, scored, computation)
    elif scored.needle is not None:
        shown = _needles(everyone, scored, computation)
    else:
        if launched(sharing.processes, kept=KEPT):
            return
        shown = _perplexities(
            models, base, scored, computation, sharing.scores, by_position=by_position
        )
    if not prints():
        return
    failure = None if shown.result is None else shown.result.gate(**vars(gates))
    text = "\n".join(shown.lines) + "\n"
    terminal.print_result(text, shown.document, as_json=as_json, failure=failure)


@dataclass(frozen=True)
class _Shown:
    """What is printed of a run, and the result that the gates judge."""

    lines: list[str]
    document: dict[str, Any]
    result: "Perplexity | None" = None


def _perplexities(
    models: Sequence[Path],
    reference: Path | None,
    scored: Scored,
    computation: Computation,
    kept: Path | None,
    *,
    by_position: bool,
) -> _Shown:
    """The first model, and how it differs from the second, if there is one."""
    from qmix.evals.quality.evaluation import score_all
    from qmix.evals.quality.perplexity import Perplexity
    from qmix.evals.quality.window_scores import difference

    material = scored.material()
    with _layers() as progress:
        everyone = models if reference is None else [*models, reference]
        windows, scores = score_all(
            models,
            material,
            reference=reference,
            share=shared(kept, everyone, tuple(vars(computation).values())),
            progress=progress,
            **vars(computation),
        )
    result, *others = (Perplexity.of(each, windows, material.text.sha256) for each in scores)
    document = result.to_dict()
    lines = eval_text.perplexity_lines(result)
    if by_position:
        document["positions"] = [asdict(each) for each in result.positions]
        lines += eval_text.position_lines(result)
    for other in others:
        less = difference(result.windows, other.windows)
        document |= {"against": other.to_dict(), "difference": less.to_dict()}
        lines += eval_text.difference_lines(other, less)
    return _Shown(lines, document, result)


def _needles(models: Sequence[Path], scored: Scored, computation: Computation) -> _Shown:
    """What each of the models finds."""
    from qmix.evals.quality.evaluation import score_all
    from qmix.evals.quality.needles import Needles

    assert scored.needle is not None
    needles = Needles(scored.text(), scored.needle, scored.ctx)
    with _layers() as progress:
        windows, scores = score_all(models, needles, progress=progress, **vars(computation))
    results = [
        (shown_name(path), needles.result(each, windows.protocol))
        for path, each in zip(models, scores, strict=True)
    ]
    document = {"models": [{"name": name, **result.to_dict()} for name, result in results]}
    return _Shown(eval_text.needle_lines(results), document)


def _tasks(models: Sequence[Path], scored: Scored, computation: Computation) -> _Shown:
    """Each model's scores, and how the first differs from each other one."""
    from qmix.evals.harness.task_run import paired, run_tasks

    scores = [
        run_tasks(
            path,
            scored.tasks or (),
            batch_size=scored.batch_size or _BATCH_SIZE,
            limit=scored.limit,
            **vars(computation),
        )
        for path in models
    ]
    named = list(zip(map(shown_name, models), scores, strict=True))
    first = scores[0]
    less = [
        (name, [paired(ours, theirs) for ours, theirs in zip(first, other, strict=True)])
        for name, other in named[1:]
    ]
    document = {
        "models": [
            {"name": name, "scores": [score.to_dict() for score in found]} for name, found in named
        ],
        "differences": [
            {"from": name, "metrics": [None if one is None else asdict(one) for one in found]}
            for name, found in less
        ],
    }
    return _Shown(eval_text.task_lines(named, less), document)


@contextmanager
def _layers() -> Iterator[Callable[[int, int], None]]:
    """Yield progress(layers done, layers in all)."""
    if not prints():
        yield lambda *_: None
        return
    with terminal.progress() as show:
        show("tokenizing", 0, 0)
        yield lambda done, total: show(f"layer {done} of {total}", done, total)
