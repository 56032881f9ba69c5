"""The attention bench as a picture or a page: milliseconds over the prompt's length.

Knows nothing of how the times were measured.
"""

from pathlib import Path

from qmix.evals.timing.attention_bench import AttentionReport, AttentionTiming
from qmix.files import atomic_file
from qmix.pages import charts, output_file
from qmix.pages.charts import Series
from qmix.pages.page import Page, Picture, Section, html, series_table


def write(report: AttentionReport, path: Path) -> None:
    """Draw the times into a file, as its suffix says.

    Raises:
        WriteError: it cannot be written.
    """
    picture = _picture(report)
    if path.suffix.lower() != output_file.PAGE:
        output_file.write_picture(path, picture.figure, picture.alt)
        return
    left_out = {
        f"{timing.attention}, {timing.prompt} tokens": timing.left_out
        for timing in report.measurements
        if timing.left_out is not None
    }
    page = Page(
        title="Attention alone, one layer",
        lead=f"{report.heads}; {report.dtype} on {report.device}; best of {report.repetitions}; "
        f"torch {report.torch}.",
        facts=tuple((f"not run: {what}", why) for what, why in left_out.items()),
        sections=(Section("Times", (), (picture,)),),
    )
    atomic_file.write(path, html(page))


def _picture(report: AttentionReport) -> Picture:
    """A line for each implementation and window."""
    lines: dict[tuple[str, int | None], dict[int, AttentionTiming]] = {}
    for timing in report.measurements:
        if timing.best is not None:
            lines.setdefault((timing.attention, timing.window), {})[timing.prompt] = timing
    prompts = sorted({prompt for timings in lines.values() for prompt in timings})
    series = [
        Series(
            "ABCDEFGH"[style],
            name if window is None else f"{name}, window {window}",
            style,
            tuple(_milliseconds(timings.get(prompt)) for prompt in prompts),
        )
        for style, ((name, window), timings) in enumerate(lines.items())
    ]
    columns = [
        (line.key, ["-" if value is None else f"{value:.3f}" for value in line.values])
        for line in series
    ]
    return Picture(
        "attention",
        "Time of one layer's attention",
        "Without a window every token sees all keys before it.",
        f"Milliseconds by tokens of the prompt, for {', '.join(line.key for line in series)}; the "
        "table has the figures.",
        charts.lines(prompts, series, "prompt, tokens", "ms"),
        (series_table("Milliseconds", "tokens", list(map(str, prompts)), columns),),
    )


def _milliseconds(timing: AttentionTiming | None) -> float | None:
    return None if timing is None or timing.best is None else 1000 * timing.best
