"""The attention bench as a picture. The one file that needs matplotlib, and only when it draws.

Knows nothing of how the times were measured.
"""

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from qmix.evals.timing.attention_bench import AttentionReport


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be written after everything has been measured.

    Raises:
        UnsupportedError: matplotlib is not installed.
        UsageError: no such folder.
    """
    if not path.parent.is_dir():
        raise UsageError("no such folder", where="--plot", found=str(path.parent))
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UnsupportedError(
            "a plot needs matplotlib",
            where="--plot",
            found=str(error)[:120],
            remedy="pip install matplotlib.",
        ) from error


def draw_plot(report: "AttentionReport", path: Path) -> None:
    """Draw milliseconds over the prompt's length as a PNG, with a panel for each window."""
    from matplotlib.figure import Figure

    timings = [timing for timing in report.measurements if timing.best is not None]
    windows = list(dict.fromkeys(timing.window for timing in timings))
    names = list(dict.fromkeys(timing.attention for timing in timings))
    figure = Figure(figsize=(5 * len(windows), 4), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for panel, window in zip(panels, windows, strict=True):
        for name in names:
            line = [t for t in timings if (t.window, t.attention) == (window, name)]
            if line:
                milliseconds = [1000 * (timing.best or math.nan) for timing in line]
                prompts = [timing.prompt for timing in line]
                panel.plot(prompts, milliseconds, marker="o", label=name)
        panel.set_title("all keys" if window is None else f"window {window}")
        prompts = sorted({timing.prompt for timing in timings if timing.window == window})
        panel.set_xscale("log", base=2)
        panel.set_xticks(prompts, [str(prompt) for prompt in prompts])
        panel.set_yscale("log")
        panel.set_xlabel("prompt, tokens")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("ms, one attention layer")
    figure.suptitle(f"{report.heads}; {report.dtype} on {report.device}", fontsize=10)
    figure.savefig(path, format="png")
