"""Attention alone over whole prompts: every implementation beside the eager one, as a table.

Queries, keys and values are random; a prompt is one causal pass, with and without a sliding window.
Knows nothing of a model but the shape of its heads.

Shape letters: H query heads, G key-value heads, S tokens of the prompt, d head width.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UnsupportedError
from qmix.evals import markdown
from qmix.evals.timing.bandwidth import seconds
from qmix.evals.timing.bench import device_name, parse_lengths
from qmix.kernels import attention
from qmix.kernels.attention import Implementation
from qmix.kernels.attention_mask import AttentionMask
from qmix.models.options import parse_device, parse_dtype
from qmix.planning import machine
from qmix.planning.process_memory import peak_resident_bytes, resident_bytes
from qmix.work_meter import Progress

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)  # eager comes first

# Bytes needed at once for each pair of a query and a key. Eager holds three float32 copies of all
# heads' scores (measured), the others at most one mask, in bool and in float32.
_EAGER_BYTES, _MASK_BYTES = 12, 5
_PROMPTS = "512,1024,2048,4096"
_HEADER = ("prompt", "window", "attention", "ms", "tokens/s", "against eager", "peak MiB")


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """The shape of an attention: H query heads, G shared key-value heads, and their width d."""

    queries: int
    shared: int
    width: int

    @classmethod
    def of(cls, config: MixtralConfig) -> "HeadShape":
        """The heads of a model."""
        return cls(
            queries=config.num_attention_heads,
            shared=config.num_key_value_heads,
            width=config.head_dim,
        )

    def __str__(self) -> str:
        return f"{self.queries} heads of {self.width}, {self.shared} of keys and values"


@dataclass(frozen=True, kw_only=True)
class AttentionTiming:
    """One implementation on one prompt.

    Attributes:
        prompt: number of tokens.
        window: number of keys that a token sees; None: all before it.
        attention: the implementation's name.
        seconds: of each repetition; empty if it was not run.
        best: the least of them.
        tokens_per_second: at that time.
        against_eager: how many times as fast as eager; None if either was not run.
        peak_bytes: of memory during a call, without its inputs; None where it cannot be measured.
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
class AttentionReport:
    """All timings of a run, and what they were measured on."""

    device: str
    dtype: str
    torch: str
    repetitions: int
    heads: HeadShape
    measurements: tuple[AttentionTiming, ...]

    def to_dict(self) -> dict[str, object]:
        """The report as a JSON document."""
        return asdict(self)

    def markdown(self) -> str:
        """A table with a line for each implementation and prompt, for a pipe or a file."""
        return f"{markdown.table(_HEADER, map(_cells, self.measurements))}\n{self._notes()}"

    def aligned(self) -> str:
        """The same for a terminal."""
        return f"{markdown.aligned(_HEADER, map(_cells, self.measurements))}\n{self._notes()}"

    def _notes(self) -> str:
        return (
            f"one attention layer: {self.heads}; {self.dtype} on {self.device}; best of "
            f"{self.repetitions}; torch {self.torch}\n"
        )


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """What to measure: prompts and windows, and on which device."""

    prompts: Sequence[int]
    windows: Sequence[int | None]
    heads: HeadShape
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def from_options(
        cls,
        directory: Path | None,
        prompts: str | None,
        window: int,
        dtype: str | None,
        device: str | None,
    ) -> "AttentionRequest":
        """Parse the options of a command; without a directory the heads are Mixtral-8x7B's.

        Raises:
            UsageError: not a list of lengths, or no such dtype or device.
        """
        target = parse_device(device)
        default = torch.bfloat16 if target.type == "cuda" else torch.float32
        config = MixtralConfig.from_pretrained(directory) if directory else MixtralConfig()
        return cls(
            prompts=parse_lengths("--prompts", prompts or _PROMPTS, least=1),
            windows=(None, window),
            heads=HeadShape.of(config),
            dtype=parse_dtype(dtype) or default,
            device=target,
        )


def run_attention_bench(
    request: AttentionRequest,
    *,
    repetitions: int = 5,
    progress: Progress = lambda what, done, total: None,
) -> AttentionReport:
    """Measure every implementation on every prompt.

    Each runs `repetitions` times after a call that does not count.
    A window as long as a prompt changes nothing and is left out.

    Args:
        progress: called with (what is measured next, prompts done, prompts in all).
    """
    cases = [
        (prompt, window)
        for window, prompt in itertools.product(request.windows, request.prompts)
        if window is None or window < prompt
    ]
    timings: list[AttentionTiming] = []
    for index, (prompt, window) in enumerate(cases):
        inputs = _random_inputs(request, prompt)
        eager: float | None = None
        for name in IMPLEMENTATIONS:
            # Scores are quadratic in the tokens.
            done = sum(tokens**2 for tokens, _ in cases[:index])
            share = IMPLEMENTATIONS.index(name) / len(IMPLEMENTATIONS)
            total = sum(tokens**2 for tokens, _ in cases)
            progress(f"{name}, {prompt} tokens", done + share * prompt**2, total)
            timing = AttentionTiming(prompt=prompt, window=window, attention=name)
            timing = _timed(timing, name, inputs, repetitions)
            eager = timing.best if name == "eager" else eager
            if timing.best is not None and eager is not None:
                timing = replace(timing, against_eager=eager / timing.best)
            timings.append(timing)
    return AttentionReport(
        device=device_name(request.device),
        dtype=str(request.dtype).removeprefix("torch."),
        torch=torch.__version__,
        repetitions=repetitions,
        heads=request.heads,
        measurements=tuple(timings),
    )


def _random_inputs(request: AttentionRequest, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (1, H, S, d), and keys and values (1, G, S, d)."""
    heads, device = request.heads, request.device
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, n, prompt, heads.width, generator=generator, device=device)
        for n in (heads.queries, heads.shared, heads.shared)
    )
    return q.to(request.dtype), k.to(request.dtype), v.to(request.dtype)


@torch.no_grad()
def _timed(
    timing: AttentionTiming,
    name: Implementation,
    inputs: tuple[Tensor, Tensor, Tensor],
    repetitions: int,
) -> AttentionTiming:
    """The timing with its measurements, or with the reason why there are none."""
    q, k, v = inputs
    too_large = _too_large(name, q)
    if too_large is not None:
        return replace(timing, left_out=too_large)

    def call() -> None:
        attention.attend_with(name, q, k, v, AttentionMask(timing.window))

    try:
        attention.checked_implementation(name)
        peak = _peak_of(call, q.device)  # compiles kernels
    except UnsupportedError as error:
        reason = error.what if error.found is None else f"{error.what}: {error.found}"
        return replace(timing, left_out=reason)
    times = tuple(seconds(call, q.device) for _ in range(repetitions))
    return replace(
        timing,
        seconds=times,
        best=min(times),
        tokens_per_second=timing.prompt / min(times),
        peak_bytes=peak,
    )


def _too_large(name: Implementation, q: Tensor) -> str | None:
    """Why queries (1, H, S, d) do not fit the memory; None if they do."""
    _, heads, tokens, _ = q.shape
    needed = tokens**2 * (_EAGER_BYTES * heads if name == "eager" else _MASK_BYTES)
    free = _free_bytes(q.device)
    if needed <= free:
        return None
    return f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine.memory().available


def _peak_of(call: Callable[[], None], device: torch.device) -> int | None:
    """The memory that a call needs at once, in bytes; None where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    call()  # libraries start their threads
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or memory that malloc keeps for reuse would not count
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    except (OSError, AttributeError, TypeError):
        return None
    resident = resident_bytes()
    call()
    peak = peak_resident_bytes()
    return None if resident is None or peak is None else max(0, peak - resident)


def _cells(timing: AttentionTiming) -> tuple[str, ...]:
    window = "-" if timing.window is None else str(timing.window)
    case = (str(timing.prompt), window, timing.attention)
    if timing.best is None or timing.tokens_per_second is None:
        return (*case, f"not run: {timing.left_out}", "-", "-", "-")
    return (
        *case,
        f"{1000 * timing.best:.2f}",
        f"{timing.tokens_per_second:,.0f}",
        "-" if timing.against_eager is None else f"{timing.against_eager:.2f}",
        "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:,.1f}",
    )
