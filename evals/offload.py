"""A checkpoint in less memory than it has bytes: its speed, its peak memory, and what it read.

`python -m qmix.evals.offload DIR --ram 8GiB [--vram 16GiB] [--new 16] [--prompt 4]
[--temperature T] [--json FILE]`. The peak is the operating system's own figure (VmHWM), in which
mapped files count and the page cache does not. The exit code is 5 if it is above the budget.
"""

import argparse
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qmix import MixtralForCausalLM, __version__, instruction_sets, strict_json
from qmix.errors import QualityError, UsageError
from qmix.evals.command import exit_code
from qmix.evals.timing.bandwidth import (
    copy_bandwidth,
    disk_bandwidth,
    interconnect_bandwidth,
    read_bandwidth,
)
from qmix.formats.metadata import read_metadata
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.hub.local import shown_name
from qmix.planning import machine, roofline
from qmix.planning.byte_sizes import parse_size, show
from qmix.planning.plan import plan
from qmix.planning.process_memory import peak_resident_bytes
from qmix.planning.roofline import Rate, Rates


@dataclass(frozen=True, kw_only=True)
class OffloadRequest:
    """What to run.

    Attributes:
        directory: the checkpoint.
        ram, vram: budgets of memory such as "8GiB"; None is no budget.
        prompt: number of random tokens before the first new one.
        new: number of tokens to generate.
        temperature: 0 is greedy. Random weights soon repeat one token, and with it one set of
            experts; a high temperature keeps them changing.
    """

    directory: Path
    ram: str | None
    vram: str | None
    prompt: int
    new: int
    temperature: float = 0.0
    seed: int = 0

    @property
    def ram_bytes(self) -> int | None:
        return None if self.ram is None else parse_size(self.ram, where="ram")

    @property
    def vram_bytes(self) -> int | None:
        return None if self.vram is None else parse_size(self.vram, where="vram")

    @property
    def command(self) -> str:
        """The command line of this request."""
        words = ["--ram", self.ram] if self.ram else []
        words += ["--vram", self.vram] if self.vram else []
        words += ["--prompt", str(self.prompt), "--new", str(self.new)]
        words += ["--temperature", str(self.temperature)]
        return f"python -m qmix.evals.offload DIR {shlex.join(words)}"


@dataclass(frozen=True, kw_only=True)
class OffloadRecord:
    """One run.

    Attributes:
        checkpoint_bytes: size of the checkpoint's weight files.
        ram, vram: the budgets in bytes; None without a budget.
        peak_host_bytes: VmHWM of the whole process.
        peak_device_bytes: reserved by torch; device memory beyond the budget is blocked by a
            ballast.
        load_s, first_token_s, decode_s: seconds; decode_s of all tokens after the first.
        ids: the generated tokens.
        bandwidths: bytes a second, measured after the run: of the host's memory, of the
            checkpoint's disk with nothing cached, and with a GPU of its memory and its
            interconnect.
        bound_tokens_per_s: of the plan's step (qmix.planning.roofline) at the hit rate of this run.
            If the page cache serves reads instead of the disk, the run may be faster.
        experts: what the store did after loading.
    """

    command: str
    versions: dict[str, str]
    machine: dict[str, Any]
    checkpoint: str
    checkpoint_bytes: int
    ram: int | None
    vram: int | None
    peak_host_bytes: int
    peak_device_bytes: int
    prompt_tokens: int
    new_tokens: int
    load_s: float
    first_token_s: float
    decode_s: float
    tokens_per_s: float
    ids: tuple[int, ...]
    bandwidths: dict[str, float]
    bound_tokens_per_s: float
    experts: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def within_budget(self) -> bool:
        """Whether the process kept to its budget of host memory."""
        return self.ram is None or self.peak_host_bytes <= self.ram

    def __str__(self) -> str:
        budget = "none" if self.ram is None else show(self.ram)
        read = self.experts.get("disk_bytes", 0), self.experts.get("prefill_disk_bytes", 0)
        return (
            f"{show(self.checkpoint_bytes)} of checkpoint; host budget {budget}, peak "
            f"{show(self.peak_host_bytes)}; {self.new_tokens} tokens, first after "
            f"{self.first_token_s:.1f} s, then {self.tokens_per_s:.3f} tok/s "
            f"(bound {self.bound_tokens_per_s:.2f}); read for steps {show(read[0])}, for the prompt "
            f"{show(read[1])}"
        )


def peak_host_bytes() -> int:
    """The process's peak resident memory in bytes.

    Raises:
        UsageError: the system does not report it (only Linux does).
    """
    peak = peak_resident_bytes()
    if peak is None:
        raise UsageError(
            "this system does not report a process's peak memory", expected="Linux's /proc"
        )
    return peak


def measure_offload(request: OffloadRequest) -> OffloadRecord:
    """Load within the budgets, then generate after a prompt of random tokens.

    Raises:
        QmixError: the checkpoint is damaged or does not fit, or the system does not report memory.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ballast = _ballast(request)
        begun = time.perf_counter()
        model = MixtralForCausalLM.from_pretrained(
            request.directory,
            ram=request.ram,
            vram=request.vram,
            max_context=request.prompt + request.new,
        )
        load_s = time.perf_counter() - begun
        ids, times = _generate(model, request)
    peak_device = 0
    if ballast is not None:
        peak_device = torch.cuda.max_memory_reserved() - ballast.nbytes
    del ballast
    decode_s, peak_host = times[-1] - times[0], peak_host_bytes()
    rates = _measured_rates(model.device, request.directory)
    gpu, files = model.device.type == "cuda", request.directory.glob("*.safetensors")
    names = ("host", "disk", "device", "interconnect") if gpu else ("host", "disk")
    return OffloadRecord(
        command=request.command,
        versions={
            "qmix": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        machine=_machine(gpu),
        checkpoint=shown_name(request.directory),
        checkpoint_bytes=sum(path.stat().st_size for path in files),
        ram=request.ram_bytes,
        vram=request.vram_bytes,
        peak_host_bytes=peak_host,
        peak_device_bytes=peak_device,
        prompt_tokens=request.prompt,
        new_tokens=len(ids),
        load_s=load_s,
        first_token_s=times[0],
        decode_s=decode_s,
        tokens_per_s=(len(ids) - 1) / decode_s if decode_s else 0.0,
        ids=tuple(ids),
        bandwidths={name: getattr(rates, name).bandwidth for name in names},
        bound_tokens_per_s=1 / _least_step_seconds(model, request, rates),
        experts={} if model.store is None else model.store.statistics().to_dict(),
        warnings=tuple(str(warning.message) for warning in caught),
    )


def _generate(model: MixtralForCausalLM, request: OffloadRequest) -> tuple[list[int], list[float]]:
    """The generated ids, and the seconds after which each was there."""
    generator = torch.Generator().manual_seed(request.seed)
    prompt = torch.randint(3, model.config.vocab_size, (1, request.prompt), generator=generator)
    config = GenerationConfig(
        max_new_tokens=request.new,
        do_sample=request.temperature != 0,
        temperature=request.temperature,
        seed=request.seed,
    )
    ids, times = [], []
    with torch.no_grad():
        for token in stream(model, GenerationInputs(prompt, config)):
            ids.append(int(token.ids))
            times.append(token.elapsed_s)
    return ids, times


def _machine(gpu: bool) -> dict[str, Any]:
    return {
        "cpu": machine.processor(),
        "features": sorted(instruction_sets.features() & instruction_sets.NEEDED),
        "threads": torch.get_num_threads(),
        "ram": machine.memory().total,
        "gpu": torch.cuda.get_device_name() if gpu else None,
    }


def _measured_rates(device: torch.device, directory: Path) -> Rates:
    """What each memory can do now; without a GPU the host's memory stands for the GPU's two."""
    host = Rate(read_bandwidth(torch.device("cpu")), "measured")
    disk = Rate(disk_bandwidth(directory), "measured")
    if device.type == "cpu":
        return Rates(device=host, interconnect=host, host=host, disk=disk)
    return Rates(
        device=Rate(copy_bandwidth(device), "measured"),
        interconnect=Rate(interconnect_bandwidth(device), "measured"),
        host=host,
        disk=disk,
    )


def _least_step_seconds(model: MixtralForCausalLM, request: OffloadRequest, rates: Rates) -> float:
    """The least time of a step with the hit rate of this run."""
    gpu, store = model.device.type == "cuda", model.store
    planned = plan(
        read_metadata(request.directory),
        gpu=gpu,
        ram=request.ram_bytes,
        vram=request.vram_bytes,
        context=request.prompt + request.new,
    )
    if store is None:
        return planned.step_cost.seconds("resident" if gpu else "host", rates)
    hit = store.statistics().hit_rate
    if gpu:
        path: roofline.DecodePath = "cpu" if store.statistics().path == "cpu" else "interconnect"
        return replace(planned.step_cost, hit=hit).seconds(path, rates)
    return replace(planned.step_cost, hit=hit, cold=1 - hit).seconds("host and disk", rates)


def _ballast(request: OffloadRequest) -> torch.Tensor | None:
    """Blocks the rest of a GPU's memory, so that only the budget is left."""
    if request.vram_bytes is None or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    rest = max(0, free - request.vram_bytes)
    return torch.empty(rest, dtype=torch.uint8, device="cuda")


def _print(request: OffloadRequest, record_file: Path | None) -> None:
    record = measure_offload(request)
    sys.stdout.write(f"{record}\n")
    if record_file is not None:
        strict_json.write(record_file, asdict(record), indent=1)
    if not record.within_budget:
        raise QualityError(
            "the process exceeded its budget of host memory",
            expected=f"at most {show(record.ram or 0)}",
            found=show(record.peak_host_bytes),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.offload", description=__doc__)
    parser.add_argument("directory", type=Path, help="checkpoint directory")
    parser.add_argument("--ram", help="budget of host memory, such as 8GiB")
    parser.add_argument("--vram", help="budget of device memory")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate (16)")
    parser.add_argument("--prompt", type=int, default=4, help="random tokens before them (4)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    options = parser.parse_args(arguments)
    request = OffloadRequest(
        directory=options.directory,
        ram=options.ram,
        vram=options.vram,
        prompt=options.prompt,
        new=options.new,
        temperature=options.temperature,
    )
    return exit_code("offload", lambda: _print(request, options.json))


if __name__ == "__main__":
    sys.exit(main())
