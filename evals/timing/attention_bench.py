"""Attention alone over whole prompts: every implementation beside the eager one, as a table and a plot.

What the reference page shows as a picture without numbers ("Expected speedups"). Queries, keys and
values are random; a prompt is one causal pass, with and without a sliding window. Knows no model but
the shape of its heads.

Shape letters: H query heads, G key-value heads, S tokens of the prompt, d head width.
"""

import ctypes
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UnsupportedError, UsageError
from qmix.evals.timing.bandwidth import seconds
from qmix.evals.timing.bench import device_name, numbers
from qmix.kernels import attention
from qmix.kernels.attention import AttentionMask, Implementation
from qmix.models.options import parse_device, parse_dtype

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)  # eager comes first

# Bytes at once for each pair of a query and a key: eager has three float32 copies of all heads'
# scores (measured), the others one mask at most, in bool and in float32.
_EAGER_BYTES, _MASK_BYTES = 12, 5


_PROMPTS = "512,1024,2048,4096"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The shape of an attention: H query heads, G shared key-value heads, their width d."""

    queries: int
    shared: int
    width: int

    @classmethod
    def of(cls, config: MixtralConfig) -> "Heads":
        return cls(
            queries=config.num_attention_heads,
            shared=config.num_key_value_heads,
            width=config.head_dim,
        )

    def __str__(self) -> str:
        return f"{self.queries} heads of {self.width}, {self.shared} of keys and values"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One implementation on one prompt.

    Attributes:
        prompt: tokens. window: keys that a token sees; None: all before it.
        attention: the implementation's name.
        seconds: of each repetition; empty where it was not run.
        best: the least of them. tokens_per_second: by that.
        against_eager: how many times as fast; None where either was not run.
        peak_bytes: of memory during a call, its inputs not counted; None where nothing tells.
        left_out: why it was not run.
    """

    prompt: int
    window: int | None
    attention: str
    seconds: tuple[float, ...] = ()
    best: float | None = None
    tokens_per_second: float | None = None
    against_eager: float | None = None
    peak_bytes: int | None = None
    left_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measurements of a run and what they were taken on."""

    device: str
    dtype: str
    torch: str
    repetitions: int
    heads: Heads
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def markdown(self) -> str:
        """The table, a line an implementation and prompt."""
        header = ("prompt", "window", "attention", "ms", "tokens/s", "against eager", "peak MiB")
        lines = [header, tuple("---" for _ in header), *map(_row, self.measurements)]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return (
            f"{table}\n\none attention layer: {self.heads}; {self.dtype} on {self.device}; best of "
            f"{self.repetitions}; torch {self.torch}\n"
        )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure: prompts and windows, on what, and where the plot goes."""

    prompts: Sequence[int]
    windows: Sequence[int | None]
    heads: Heads
    dtype: torch.dtype
    device: torch.device
    plot: Path | None = None

    @classmethod
    def of(
        cls,
        directory: Path | None,
        prompts: str | None,
        window: int,
        dtype: str | None,
        device: str | None,
        plot: Path | None,
    ) -> "Request":
        """From a command's options: without a directory Mixtral-8x7B's heads.

        Raises:
            UsageError: not a list of lengths, no such dtype, device or folder.
            UnsupportedError: a plot, and no matplotlib.
        """
        target = parse_device(device)
        if plot is not None:
            _check_plot(plot)
        default = torch.bfloat16 if target.type == "cuda" else torch.float32
        config = MixtralConfig.from_pretrained(directory) if directory else MixtralConfig()
        return cls(
            prompts=numbers("--prompts", prompts or _PROMPTS, least=1),
            windows=(None, window),
            heads=Heads.of(config),
            dtype=parse_dtype(dtype) or default,
            device=target,
            plot=plot,
        )


def run(
    request: Request,
    *,
    repetitions: int = 5,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Measure every implementation on every prompt, `repetitions` times after a call that does not count.

    A window that a prompt does not pass changes nothing and is left out.
    """
    cases = [
        (prompt, window)
        for window, prompt in itertools.product(request.windows, request.prompts)
        if window is None or window < prompt
    ]
    found: list[Measurement] = []
    for index, (prompt, window) in enumerate(cases):
        drawn = _drawn(request, prompt)
        eager: float | None = None
        for name in IMPLEMENTATIONS:
            progress(f"{name}, {prompt} tokens", index, len(cases))
            one = Measurement(prompt=prompt, window=window, attention=name)
            one = _measured(one, name, drawn, repetitions)
            eager = one.best if name == "eager" else eager
            if one.best is not None and eager is not None:
                one = replace(one, against_eager=eager / one.best)
            found.append(one)
    report = Report(
        device=device_name(request.device),
        dtype=str(request.dtype).removeprefix("torch."),
        torch=torch.__version__,
        repetitions=repetitions,
        heads=request.heads,
        measurements=tuple(found),
    )
    if request.plot is not None:
        plot(report, request.plot)
    return report


def _drawn(request: Request, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random (1, H, S, d) queries, (1, G, S, d) keys and values."""
    heads, device = request.heads, request.device
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, n, prompt, heads.width, generator=generator, device=device)
        for n in (heads.queries, heads.shared, heads.shared)
    )
    return q.to(request.dtype), k.to(request.dtype), v.to(request.dtype)


@torch.no_grad()
def _measured(
    one: Measurement, name: Implementation, drawn: tuple[Tensor, Tensor, Tensor], repetitions: int
) -> Measurement:
    q, k, v = drawn
    too_large = _too_large(name, q)
    if too_large is not None:
        return replace(one, left_out=too_large)

    def call() -> None:
        attention.attend_with(name, q, k, v, AttentionMask(one.window))

    try:
        attention.checked_implementation(name)
        peak = _peak_of(call, q.device)  # compiles kernels
    except UnsupportedError as error:
        told = error.what if error.found is None else f"{error.what}: {error.found}"
        return replace(one, left_out=told)
    times = tuple(seconds(call, q.device) for _ in range(repetitions))
    return replace(
        one,
        seconds=times,
        best=min(times),
        tokens_per_second=one.prompt / min(times),
        peak_bytes=peak,
    )


def _too_large(name: Implementation, q: Tensor) -> str | None:
    """What queries (1, H, S, d) would need and is not free; None if it is."""
    _, heads, tokens, _ = q.shape
    needed = tokens**2 * (_EAGER_BYTES * heads if name == "eager" else _MASK_BYTES)
    free = _free(q.device)
    if free is None or needed <= free:
        return None
    return f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"


def _free(device: torch.device) -> int | None:
    """Bytes that may still be taken; None where /proc does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _proc("/proc/meminfo", "MemAvailable")


def _peak_of(call: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that a call takes at once beyond what is held before it; None where nothing tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    call()  # libraries start their threads
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that is kept for reuse would not be counted
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    except (OSError, AttributeError, TypeError):
        return None
    held = _proc("/proc/self/status", "VmRSS")
    call()
    peak = _proc("/proc/self/status", "VmHWM")
    return None if held is None or peak is None else max(0, peak - held)


def _proc(path: str, name: str) -> int | None:
    """Bytes of a line in kB of a file of Linux; None without it."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(found[0]) if found else None


def _row(one: Measurement) -> tuple[str, ...]:
    window = "-" if one.window is None else str(one.window)
    case = (str(one.prompt), window, one.attention)
    if one.best is None or one.tokens_per_second is None:
        return (*case, f"not run: {one.left_out}", "-", "-", "-")
    return (
        *case,
        f"{1000 * one.best:.2f}",
        f"{one.tokens_per_second:,.0f}",
        "-" if one.against_eager is None else f"{one.against_eager:.2f}",
        "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.1f}",
    )


def _check_plot(path: Path) -> None:
    """Refuse a plot that could not be written once everything is measured.

    Raises:
        UnsupportedError: matplotlib is not there. UsageError: no such folder.
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
            remedy="pip install 'qmix-runtime[plot]'.",
        ) from error


def plot(report: Report, path: Path) -> None:
    """Milliseconds over the prompt's length as a PNG, a panel with no window and one a window."""
    from matplotlib.figure import Figure

    ran = [one for one in report.measurements if one.best is not None]
    windows = list(dict.fromkeys(one.window for one in ran))
    figure = Figure(figsize=(5 * len(windows), 4), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for panel, window in zip(panels, windows, strict=True):
        for name in IMPLEMENTATIONS:
            line = [one for one in ran if (one.window, one.attention) == (window, name)]
            if line:
                times = [1000 * (one.best or math.nan) for one in line]
                panel.plot([one.prompt for one in line], times, marker="o", label=name)
        panel.set_title("all keys" if window is None else f"window {window}")
        prompts = sorted({one.prompt for one in ran if one.window == window})
        panel.set_xscale("log", base=2)
        panel.set_xticks(prompts, [str(prompt) for prompt in prompts])
        panel.set_yscale("log")
        panel.set_xlabel("prompt, tokens")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("ms, one attention layer")
    figure.suptitle(f"{report.heads}; {report.dtype} on {report.device}", fontsize=10)
    figure.savefig(path, format="png")
