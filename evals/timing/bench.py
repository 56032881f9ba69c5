"""How fast a model reads prompts and writes tokens, in the grammar of llama.cpp's llama-bench.

`pp512` is a prompt of 512 tokens up to the first new one, `tg128` is 128 new tokens one by one;
`@ d4096` stands after 4096 tokens that the cache holds already. Tokens are drawn at random and chosen
greedily, through the same loop as `qmix generate`. Every figure stands beside its bound: the bytes
that a step reads, over the copy bandwidth of the same device in the same run.

Shape letters: B rows, N new tokens.
"""

import itertools
import platform
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.evals.timing import traffic
from qmix.evals.timing.bandwidth import copy_bandwidth, seconds, synchronize
from qmix.evals.timing.traffic import Traffic
from qmix.experts.statistics import Statistics
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import Token, stream
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache

# Steps whose distinct experts are counted; each is run once more, outside the timing.
_COUNTED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Test:
    """One line of the table: `tokens` of a prompt (pp) or one by one (tg), in each of `batch` rows."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0
    batch: int = 1

    __test__ = False  # not pytest's

    def __str__(self) -> str:
        after = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{after}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one test took.

    Attributes:
        test: as it is named in the table. batch: rows.
        seconds: of each repetition.
        tokens_per_second, deviation: of all rows together, mean and standard deviation.
        bytes_per_step: what a step reads, the mean over the first steps; tg only, as all below.
        bytes_per_token: the same divided by the rows.
        distinct_experts: a layer and step.
        bandwidth: bytes a second that were read. of_bound: that over the copy bandwidth.
        peak_bytes: of device memory during the test; on a CPU the process's largest so far.
        experts: what the store did meanwhile, if the model is offloaded.
    """

    test: str
    batch: int
    seconds: tuple[float, ...]
    tokens_per_second: float
    deviation: float
    bytes_per_step: float | None = None
    bytes_per_token: float | None = None
    distinct_experts: float | None = None
    bandwidth: float | None = None
    of_bound: float | None = None
    peak_bytes: int = 0
    experts: Statistics | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All measurements of a run and what they were taken on.

    Attributes:
        size: bytes of the weights as stored; `weights`: how many.
        copy_bandwidth: bytes a second, read and written both counted: the bound.
    """

    model: str
    size: int
    weights: int
    device: str
    dtype: str
    torch: str
    repetitions: int
    copy_bandwidth: float
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, object]:
        found = asdict(self)
        for shown, one in zip(found["measurements"], self.measurements, strict=True):
            shown["experts"] = None if one.experts is None else one.experts.to_dict()
        return found

    def markdown(self) -> str:
        """The table, a line a test."""
        header = (
            *("model", "size", "weights", "device", "batch", "test", "t/s"),
            *("GB/s", "MB/token", "of bound", "experts", "peak GiB"),
        )
        notes = "".join(
            f"\n{one.test}: {one.experts}\n" for one in self.measurements if one.experts
        )
        rows = [self._row(one) for one in self.measurements]
        lines = [header, tuple("---" for _ in header), *rows]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return (
            f"{table}\n\nbound: {self.copy_bandwidth / 1e9:.1f} GB/s, a copy in the same run; "
            f"{self.repetitions} repetitions; {self.dtype}; torch {self.torch}\n{notes}"
        )

    def _row(self, one: Measurement) -> tuple[str, ...]:
        read = ("-", "-", "-", "-")
        if one.bandwidth is not None:
            assert one.bytes_per_token is not None
            assert one.of_bound is not None
            assert one.distinct_experts is not None
            read = (
                f"{one.bandwidth / 1e9:.1f}",
                f"{one.bytes_per_token / 1e6:.1f}",
                f"{100 * one.of_bound:.1f} %",
                f"{one.distinct_experts:.2f}",
            )
        return (
            self.model,
            f"{self.size / 2**30:.2f} GiB",
            f"{self.weights / 1e9:.2f} B",
            self.device,
            str(one.batch),
            one.test,
            f"{one.tokens_per_second:.2f} ± {one.deviation:.2f}",
            *read,
            f"{one.peak_bytes / 2**30:.2f}",
        )


def tests_of(prompts: str, news: str, depths: str, batches: str) -> tuple[Test, ...]:
    """The tests that llama-bench's lists stand for, as in `-p 512 -n 128 -d 0,4096 -b 1,8`.

    A length of 0 leaves its kind out.

    Raises:
        UsageError: not a list of whole numbers, or nothing to measure.
    """
    lengths = [("pp", n) for n in numbers("-p", prompts)]
    lengths += [("tg", n) for n in numbers("-n", news)]
    found: list[Test] = []
    for batch, depth, (kind, tokens) in itertools.product(
        numbers("-b", batches, least=1), numbers("-d", depths), lengths
    ):
        if tokens:
            found.append(
                Test(kind="pp" if kind == "pp" else "tg", tokens=tokens, depth=depth, batch=batch)
            )
    if not found:
        raise UsageError("nothing to measure", expected="-p or -n above 0")
    return tuple(found)


def run(
    model: MixtralForCausalLM,
    tests: Sequence[Test],
    *,
    name: str,
    repetitions: int = 5,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Measure every test, `repetitions` times after one that does not count.

    Raises:
        UsageError: a test that does not fit the model's positions.
    """
    positions = model.config.max_position_embeddings
    for test in tests:
        if test.depth + test.tokens + 1 > positions:
            raise UsageError(
                f"{test} does not fit the model's positions",
                expected=f"at most {positions - 1} in all",
                found=test.depth + test.tokens,
            )
    bound = copy_bandwidth(model.device)
    measured = []
    for index, test in enumerate(tests):
        progress(f"{test}, batch {test.batch}", index, len(tests))
        measured.append(measure(model, test, repetitions, bound, seed))
    return Report(
        model=name,
        size=traffic.weight_bytes(model),
        weights=traffic.weight_count(model),
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        torch=torch.__version__,
        repetitions=repetitions,
        copy_bandwidth=bound,
        measurements=tuple(measured),
    )


def measure(
    model: MixtralForCausalLM,
    test: Test,
    repetitions: int,
    bound: float,
    seed: int = 0,
    *,
    filled: bool = False,
) -> Measurement:
    """One test: prefill to its depth, then the timed part again and again from there.

    Args:
        bound: bytes a second.
        filled: random keys and values stand for the prefill.
    """
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    known = test.depth + (test.tokens if test.kind == "pp" else 1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (test.batch, known), generator=generator)
    new = 1 if test.kind == "pp" else test.tokens
    cache = model.new_cache(test.batch, known + new)
    if filled:
        fill(cache, test.depth)
    elif test.depth:
        _generate(model, ids[:, : test.depth], cache, 1)
    tokens: list[Token] = []

    def timed() -> None:
        cache.rewind(test.depth)
        tokens[:] = _generate(model, ids, cache, new)

    timed()  # compiles kernels, captures graphs
    store = model.store
    before = None if store is None else store.statistics()
    times = tuple(seconds(timed, device) for _ in range(repetitions))
    peak = _peak(device)
    rates = [test.batch * test.tokens / each for each in times]
    mean = statistics.fmean(rates)
    measurement = Measurement(
        test=str(test),
        batch=test.batch,
        seconds=times,
        tokens_per_second=mean,
        deviation=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        peak_bytes=peak,
        experts=None if store is None or before is None else store.statistics().since(before),
    )
    if test.kind == "pp":
        return measurement
    cache.rewind(test.depth)
    chosen = [ids[:, -1:], *(token.ids[:, None] for token in tokens)]
    steps = _counted(model, cache, chosen[: min(_COUNTED_STEPS, test.tokens)])
    read = statistics.fmean(step.total for step in steps)
    bandwidth = read * mean / test.batch
    return replace(
        measurement,
        bytes_per_step=read,
        bytes_per_token=read / test.batch,
        distinct_experts=statistics.fmean(step.distinct for step in steps),
        bandwidth=bandwidth,
        of_bound=bandwidth / bound,
    )


def fill(cache: KVCache, length: int) -> None:
    """Make an empty cache hold `length` positions of random keys and values."""
    assert not cache.length
    cache.reserve(length)
    for layer in range(len(cache)):
        for kept in cache.storage(layer):
            kept[:, :, :length].normal_()
    cache.advance(length)


def _generate(model: MixtralForCausalLM, ids: Tensor, cache: KVCache, new: int) -> list[Token]:
    inputs = GenerationInputs(ids, GenerationConfig(max_new_tokens=new), cache=cache)
    with torch.no_grad():
        return list(stream(model, inputs))


def _counted(model: MixtralForCausalLM, cache: KVCache, columns: Sequence[Tensor]) -> list[Traffic]:
    return [traffic.of_step(model, column.to(model.device), cache) for column in columns]


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind and torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def numbers(option: str, text: str, least: int = 0) -> list[int]:
    """A list of lengths as `0,4096`.

    Raises:
        UsageError: not a list of whole numbers from `least` on.
    """
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and least <= int(part) <= 1 << 20 for part in found):
        raise UsageError(
            "not a list of lengths",
            where=option,
            expected=f"whole numbers from {least} on, as 0,4096",
            found=text,
        )
    return [int(part) for part in found]
