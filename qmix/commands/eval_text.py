"""The results of `qmix eval` in words. Knows figures, and not how they were measured."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmix.commands import terminal
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix.evals.harness.task_run import MetricScore
    from qmix.evals.quality.bootstrap import Estimate, Interval
    from qmix.evals.quality.needles import NeedleResult
    from qmix.evals.quality.perplexity import Perplexity
    from qmix.evals.quality.window_scores import Difference


def perplexity_lines(result: "Perplexity") -> list[str]:
    """A model's perplexity, and how far it is from its reference."""
    lines = [
        f"perplexity  {result.perplexity:.4f} ± {result.stderr:.4f}",
        f"tokens      {result.tokens}",
        f"protocol    {result.protocol}",
        f"text        sha256 {result.text_sha256}",
    ]
    other = result.reference
    if other is None:
        return lines
    ratio = f"{result.perplexity / other.perplexity:.4f}{_within(other.perplexity_ratio_interval, '.4f')}"
    return [
        *lines,
        f"reference   {other.perplexity:.4f}, ratio {ratio}",
        f"KL          mean {other.kl_mean:.6f}{_within(other.kl_interval, '.6f')}, "
        f"median {other.kl_median:.6f}, p99 {other.kl_p99:.6f} nats",
        f"top-1       {100 * other.top1_agreement:.2f} % agree",
        f"intervals   {_method(len(result.windows), other.kl_interval)}",
    ]


def difference_lines(other: "Perplexity", less: "Difference") -> list[str]:
    """How a model differs from another that was scored on the same windows."""
    change = less.perplexity
    lines = [
        f"against     {other.perplexity:.4f} ± {other.stderr:.4f}; this model's less it "
        f"{change.value:+.4f}{_within(change.interval, '+.4f')}, "
        f"ratio {less.perplexity_ratio.shown('.4f')}"
    ]
    if less.kl is not None and other.reference is not None:
        ratio = "" if less.kl_ratio is None else f", ratio {less.kl_ratio.shown('.3f')}"
        lines.append(
            f"its KL      mean {other.reference.kl_mean:.6f}; this model's less it "
            f"{less.kl.value:+.6f}{_within(less.kl.interval, '+.6f')}{ratio}"
        )
    else:
        lines.append(f"intervals   {_method(less.windows, change.interval)}")
    return lines


def position_lines(result: "Perplexity") -> list[str]:
    """The scores by position in the window, a line each."""
    lines = ["", f"{'position':>15} {'perplexity':>11} {'mean KL':>10}"]
    for at in result.positions:
        perplexity = "-" if at.perplexity is None else f"{at.perplexity:.4f}"
        kl = "-" if at.kl is None else f"{at.kl:.6f}"
        lines.append(f"{f'{at.start} to {at.stop - 1}':>15} {perplexity:>11} {kl:>10}")
    return lines


def _within(interval: "Interval | None", form: str) -> str:
    return "" if interval is None else f" ({interval.shown(form)})"


def _method(windows: int, interval: "Interval | None") -> str:
    """How intervals were made, or why there are none."""
    if interval is None:
        return f"none: {counted(windows, 'window')} are too few; a smaller --ctx makes more"
    return f"paired bootstrap over {counted(windows, 'window')}"


def needle_lines(results: "Sequence[tuple[str, NeedleResult]]") -> list[str]:
    """The needles that each model found, a line a depth."""
    first = results[0][1]
    lines = [first.protocol, "", "depth  found, log-likelihood of the number"]
    lines.append(f"{'':6} " + " ".join(f"{name[:24]:>24}" for name, _ in results))
    for number, at in enumerate(first.depths):
        each = [result.depths[number] for _, result in results]
        cells = (f"{f'{one.found} of {one.trials}, {one.log_likelihood:.2f}':>24}" for one in each)
        lines.append(f"{100 * at.depth:4.0f} % " + " ".join(cells))
    return lines


def task_lines(
    named: "Sequence[tuple[str, Sequence[MetricScore]]]",
    less: "Sequence[tuple[str, Sequence[Estimate | None]]]",
) -> list[str]:
    """Scores by metric, a column for each model; then how the first differs from the others."""
    header = " ".join(terminal.cells([name for name, _ in named], 24, right=True))
    lines = [f"{'':36} {header}"]
    for row in zip(*(scores for _, scores in named), strict=True):
        title = f"{row[0].task} {row[0].metric} ({len(row[0].documents)})"
        lines.append(
            f"{terminal.cells([title], 36)[0]} " + " ".join(f"{_scored(each):>24}" for each in row)
        )
    for name, found in less:
        lines += ["", f"{named[0][0]} beside {name}, paired bootstrap over documents:"]
        for score, difference in zip(named[0][1], found, strict=True):
            if difference is not None:
                lines.append(f"{score.task} {score.metric}: {_differs(score, difference)}")
    return lines


def _scored(score: "MetricScore") -> str:
    """A value and its standard error, as lm_eval gives them."""
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _differs(score: "MetricScore", difference: "Estimate") -> str:
    kind = "ratio" if score.is_perplexity else "difference"
    sign = "" if score.is_perplexity else "+"
    form = f"{sign}.4f"
    return f"{kind} {difference.value:{form}}{_within(difference.interval, form)}"
