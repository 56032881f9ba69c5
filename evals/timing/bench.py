"""How fast a model reads prompts and writes tokens, in the grammar of llama.cpp's llama-bench.

`pp512` reads a prompt of 512 tokens and ends with the first new one; `tg128` writes 128 new tokens
one by one; `@ d4096` starts after 4096 tokens that are already in the cache. Tokens are random and
chosen greedily, in the loop that `qmix generate` uses. Every figure stands beside its bound: the
bytes that a step reads over the copy bandwidth of the same device in the same run.

Shape letters: B rows. Knows nothing of the command line.
"""

import itertools
import platform
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qmix.errors import UsageError
from qmix.evals import markdown
from qmix.evals.timing import traffic
from qmix.evals.timing.bandwidth import copy_bandwidth, seconds, synchronize
from qmix.experts.statistics import Statistics
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import Token, stream
from qmix.kernels.kv_rows import fill_randomly
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.planning.byte_sizes import parse_count, show
from qmix.quantities import counted, weights
from qmix.work_meter import Progress, WorkMeter

# Steps whose distinct experts are counted; each is run once more, outside the timing.
_COUNTED_STEPS = 8
_COLUMNS = ("test", "t/s", "GB/s", "MB/token", "of bound", "experts", "peak GiB")
# Prompt tokens that take about as long as one new token: for tests that were not timed yet.
_PROMPT_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class BenchTest:
    """A line of the table: a prompt of `tokens` (pp), or `tokens` one by one (tg), in each row.

    Attributes:
        temperature: of the choice of tokens; 0 is greedy.
    """

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0
    batch: int = 1
    temperature: float = 0.0

    @property
    def label(self) -> str:
        """Its name, and its batch."""
        return f"{self}, batch {self.batch}"

    @property
    def expected_tokens(self) -> float:
        """How long a run takes, in new tokens of one row, roughly."""
        rows = 1 + self.batch / _PROMPT_TOKENS
        return rows * self.tokens / (_PROMPT_TOKENS if self.kind == "pp" else 1)

    def __str__(self) -> str:
        how = f" T{self.temperature:g}" if self.temperature else ""
        after = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{how}{after}"


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What one test took.

    Attributes:
        test: its name in the table.
        batch: number of rows.
        seconds: of each repetition.
        tokens_per_second, deviation: of all rows together, mean and standard deviation.
        bytes_per_step: what a step reads, averaged over the first steps. This and all attributes
            below up to of_bound are for tg only.
        bytes_per_token: the same divided by the rows.
        distinct_experts: in a layer and step, on average.
        bandwidth: bytes a second that were read.
        of_bound: the bandwidth over the copy bandwidth.
        peak_bytes: of device memory during the test; on a CPU the process's peak so far.
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
class BenchReport:
    """All results of a run, and what they were measured on.

    Attributes:
        size: bytes of the weights as stored.
        weights: number of weights.
        copy_bandwidth: bytes a second, where read and written bytes both count: the bound.
    """

    model: str
    size: int
    weights: int
    device: str
    dtype: str
    torch: str
    repetitions: int
    copy_bandwidth: float
    measurements: tuple[BenchResult, ...]

    def to_dict(self) -> dict[str, object]:
        """The report as a JSON document."""
        document = asdict(self)
        for entry, result in zip(document["measurements"], self.measurements, strict=True):
            entry["experts"] = None if result.experts is None else result.experts.to_dict()
        return document

    def markdown(self) -> str:
        """A table with a line for each test, for a pipe or a file."""
        header = ("model", "size", "weights", "device", "batch", *_COLUMNS)
        rows = (
            (*self._subject, str(result.batch), *self._cells(result))
            for result in self.measurements
        )
        return f"{markdown.table(header, rows)}\n{self._notes()}"

    def aligned(self) -> str:
        """The same for a terminal of 80 columns: what all tests share stands above them."""
        rows = (
            (test if result.batch == 1 else f"{test} b{result.batch}", *cells)
            for result in self.measurements
            for test, *cells in (self._cells(result),)
        )
        table = markdown.aligned(_COLUMNS, rows)
        return f"{' · '.join(self._subject)}\n\n{table}\n{self._notes()}"

    def _notes(self) -> str:
        """How it was measured, and what a store of experts did."""
        bound = f"{self.copy_bandwidth / 1e9:.1f} GB/s, a copy in the same run"
        notes = "".join(
            f"\n{result.test}: {result.experts}\n" for result in self.measurements if result.experts
        )
        times = counted(self.repetitions, "repetition")
        return f"bound: {bound}; {times}; {self.dtype}; torch {self.torch}\n{notes}"

    @property
    def _subject(self) -> tuple[str, str, str, str]:
        """The model and the device."""
        return self.model, show(self.size), weights(self.weights), self.device

    def _cells(self, result: BenchResult) -> tuple[str, ...]:
        read = ("-", "-", "-", "-")
        if result.bandwidth is not None:
            assert result.bytes_per_token is not None
            assert result.of_bound is not None
            assert result.distinct_experts is not None
            read = (
                f"{result.bandwidth / 1e9:.1f}",
                f"{result.bytes_per_token / 1e6:.1f}",
                f"{100 * result.of_bound:.1f} %",
                f"{result.distinct_experts:.2f}",
            )
        return (
            result.test,
            f"{result.tokens_per_second:.2f} ± {result.deviation:.2f}",
            *read,
            f"{result.peak_bytes / 2**30:.2f}",
        )


def parse_tests(prompts: str, news: str, depths: str, batches: str) -> tuple[BenchTest, ...]:
    """The tests of llama-bench's lists, as in `-p 512 -n 128 -d 0,4096 -b 1,8`.

    A length of 0 leaves its kind out.

    Raises:
        UsageError: not a list of whole numbers, or nothing to measure.
    """
    lengths = [("pp", n) for n in parse_lengths("-p", prompts)]
    lengths += [("tg", n) for n in parse_lengths("-n", news)]
    tests: list[BenchTest] = []
    for batch, depth, (kind, tokens) in itertools.product(
        parse_lengths("-b", batches, least=1), parse_lengths("-d", depths), lengths
    ):
        if tokens:
            test = BenchTest(
                kind="pp" if kind == "pp" else "tg", tokens=tokens, depth=depth, batch=batch
            )
            tests.append(test)
    if not tests:
        raise UsageError("nothing to measure", expected="-p or -n above 0")
    return tuple(tests)


def run_bench(
    model: MixtralForCausalLM,
    tests: Sequence[BenchTest],
    *,
    name: str,
    repetitions: int = 5,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> BenchReport:
    """Measure every test, `repetitions` times after one that does not count.

    Args:
        name: the model's name in the report.
        progress: called before and after each repetition with (what is measured, seconds so far,
            seconds in all as far as one can tell).

    Raises:
        UsageError: a test exceeds the model's positions.
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
    meter = WorkMeter({test.label: test.expected_tokens for test in tests}, progress)
    for test in tests:
        meter.plan({test.label: repetitions + 1})
    results = [measure_test(model, test, repetitions, bound, seed, meter=meter) for test in tests]
    return BenchReport(
        model=name,
        size=traffic.weight_bytes(model),
        weights=traffic.weight_count(model),
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        torch=torch.__version__,
        repetitions=repetitions,
        copy_bandwidth=bound,
        measurements=tuple(results),
    )


def measure_test(
    model: MixtralForCausalLM,
    test: BenchTest,
    repetitions: int,
    bound: float,
    seed: int = 0,
    *,
    random_cache: bool = False,
    meter: WorkMeter | None = None,
) -> BenchResult:
    """Prefill to the test's depth, then time the rest again and again from there.

    Args:
        bound: bytes a second.
        random_cache: fill the cache with random keys and values instead of prefilling it.
        meter: counts the runs, one more than repetitions, as work of the kind `test.label`.
    """
    meter = meter or WorkMeter({test.label: 1.0})
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    known = test.depth + (test.tokens if test.kind == "pp" else 1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (test.batch, known), generator=generator)
    new = 1 if test.kind == "pp" else test.tokens
    cache = model.new_cache(test.batch, known + new)
    if random_cache:
        fill_cache(cache, test.depth)
    elif test.depth:
        _generate(model, ids[:, : test.depth], cache, GenerationConfig(max_new_tokens=1))
    tokens: list[Token] = []
    config = GenerationConfig(
        max_new_tokens=new, do_sample=test.temperature > 0, temperature=test.temperature or 1.0
    )

    def run() -> None:
        cache.rewind(test.depth)
        tokens[:] = _generate(model, ids, cache, config)

    with meter.doing(test.label, test.label, 1):
        run()  # compiles kernels, captures graphs
    store = model.store
    before = None if store is None else store.statistics()
    runs = meter.each(test.label, test.label, range(repetitions), lambda _: 1)
    times = tuple(seconds(run, device) for _ in runs)
    rates = [test.batch * test.tokens / each for each in times]
    result = BenchResult(
        test=str(test),
        batch=test.batch,
        seconds=times,
        tokens_per_second=statistics.fmean(rates),
        deviation=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        peak_bytes=_peak_bytes(device),
        experts=None if store is None or before is None else store.statistics().since(before),
    )
    if test.kind == "pp":
        return result
    cache.rewind(test.depth)
    fed = [ids[:, -1:], *(token.ids[:, None] for token in tokens[:-1])]
    return _with_traffic(result, model, cache, fed[:_COUNTED_STEPS], bound)


def _with_traffic(
    result: BenchResult,
    model: MixtralForCausalLM,
    cache: KVCache,
    steps: Sequence[Tensor],
    bound: float,
) -> BenchResult:
    """Run the ids of some steps (B, 1) once more and count what they read."""
    counted = [traffic.step_traffic(model, ids.to(model.device), cache) for ids in steps]
    read = statistics.fmean(step.total for step in counted)
    bandwidth = read * result.tokens_per_second / result.batch
    return replace(
        result,
        bytes_per_step=read,
        bytes_per_token=read / result.batch,
        distinct_experts=statistics.fmean(step.distinct_experts for step in counted),
        bandwidth=bandwidth,
        of_bound=bandwidth / bound,
    )


def fill_cache(cache: KVCache, length: int) -> None:
    """Fill an empty cache with `length` positions of random keys and values."""
    assert not cache.length
    cache.reserve(length)
    for layer in range(len(cache)):
        for stored in cache.storage(layer):
            fill_randomly(stored[:, :, :length])
    cache.advance(length)


def _generate(
    model: MixtralForCausalLM, ids: Tensor, cache: KVCache, config: GenerationConfig
) -> list[Token]:
    inputs = GenerationInputs(ids, config, cache=cache)
    with torch.no_grad():
        return list(stream(model, inputs))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture and torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"


def parse_lengths(option: str, text: str, least: int = 0) -> list[int]:
    """A list of lengths such as `0,4096` or `0,4k`.

    Args:
        option: named in the error.

    Raises:
        UsageError: not a list of whole numbers of at least `least`.
    """
    lengths = [parse_count(part, where=option) for part in text.split(",")]
    if not all(least <= length <= 1 << 20 for length in lengths):
        raise UsageError(
            "a length out of range", where=option, expected=f"{least} to {1 << 20}", found=text[:80]
        )
    return lengths
