"""A checkpoint in less memory than it has bytes: tokens, the process's peak, and where bytes came from.

`python -m qmix.evals.offload DIR --ram 8GiB [--vram 16GiB] [--new 16] [--prompt 4]
[--temperature T] [--json FILE]`. The peak is the kernel's own account (VmHWM: the page cache is not in it, mapped files would be); above the budget
the exit code is 5.
"""

import argparse
import json
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

from qmix import MixtralForCausalLM, __version__
from qmix.errors import QmixError, QualityError, UsageError
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
from qmix.planning import machine, plan, roofline
from qmix.planning.byte_sizes import parse_size, show
from qmix.planning.roofline import Rate, Rates


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run.

    Attributes:
        checkpoint_bytes: of its files. ram, vram: the budgets, None without.
        peak_host_bytes: VmHWM, the process in whole. peak_device_bytes: reserved by torch; what
            is beyond the budget of device memory is held by a ballast.
        load_s, first_token_s, decode_s: seconds; decode_s of all tokens after the first.
        ids: that were generated.
        bandwidths: bytes a second, measured after the run: of the host's memory, of the disk that the
            checkpoint lies on with nothing cached, and with a GPU of its memory and of the interconnect.
        bound_tokens_per_s: of the plan's step (qmix.planning.roofline) at the hit rate that was met. What the
            system's page cache serves in the disk's place is faster.
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
    def statistics(self) -> str:
        """From the disk, in words."""
        read = self.experts.get("disk_bytes", 0), self.experts.get("prefill_disk_bytes", 0)
        return f"read for steps {show(read[0])}, for the prompt {show(read[1])}"

    @property
    def within(self) -> bool:
        """Whether the process kept to its budget of host memory."""
        return self.ram is None or self.peak_host_bytes <= self.ram

    def __str__(self) -> str:
        budget = "none" if self.ram is None else show(self.ram)
        return (
            f"{show(self.checkpoint_bytes)} of checkpoint; host budget {budget}, peak "
            f"{show(self.peak_host_bytes)}; {self.new_tokens} tokens, first after "
            f"{self.first_token_s:.1f} s, then {self.tokens_per_s:.3f} tok/s "
            f"(bound {self.bound_tokens_per_s:.2f}); {self.statistics}"
        )


def peak_host_bytes() -> int:
    """The most memory that this process has ever had resident.

    Raises:
        UsageError: the system does not say (only Linux does).
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    raise UsageError("this system does not tell a process's peak memory", expected="Linux's /proc")


def run(
    directory: Path,
    *,
    ram: str | None,
    vram: str | None,
    prompt: int,
    new: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Record:
    """Load within the budgets, then generate `new` tokens after `prompt` random ones.

    Args:
        temperature: 0 is greedy. Random weights soon repeat one token, and so one set of experts: a
            high temperature keeps them changing.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ballast = _ballast(vram)
        begun = time.perf_counter()
        model = MixtralForCausalLM.from_pretrained(
            directory, ram=ram, vram=vram, max_context=prompt + new
        )
        load_s = time.perf_counter() - begun
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=generator)
        store = model.store
        found, times = [], []
        with torch.no_grad():
            config = GenerationConfig(
                max_new_tokens=new,
                do_sample=temperature != 0,
                temperature=temperature,
                seed=seed,
            )
            for token in stream(model, GenerationInputs(ids, config)):
                found.append(int(token.ids))
                times.append(token.elapsed_s)
    peak_device = torch.cuda.max_memory_reserved() if ballast is not None else 0
    peak_device -= 0 if ballast is None else ballast.nbytes
    del ballast
    decode_s, peak_host = times[-1] - times[0], peak_host_bytes()
    name, extensions = machine.processor()
    gpu = model.device.type == "cuda"
    rates = _rates(model.device, directory)
    return Record(
        command=f"python -m qmix.evals.offload DIR {shlex.join(_options(ram, vram, prompt, new, temperature))}",
        versions={
            "qmix": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        machine={
            "cpu": name,
            "extensions": extensions,
            "threads": torch.get_num_threads(),
            "ram": machine.memory().total,
            "gpu": torch.cuda.get_device_name() if gpu else None,
        },
        checkpoint=directory.resolve().name,
        checkpoint_bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        ram=None if ram is None else parse_size(ram, where="ram"),
        vram=None if vram is None else parse_size(vram, where="vram"),
        peak_host_bytes=peak_host,
        peak_device_bytes=peak_device,
        prompt_tokens=prompt,
        new_tokens=len(found),
        load_s=load_s,
        first_token_s=times[0],
        decode_s=decode_s,
        tokens_per_s=(len(found) - 1) / decode_s if decode_s else 0.0,
        ids=tuple(found),
        bandwidths={
            name: getattr(rates, name).bandwidth
            for name in (("host", "disk", "device", "interconnect") if gpu else ("host", "disk"))
        },
        bound_tokens_per_s=1 / _seconds(directory, model, ram, vram, prompt + new, rates),
        experts={} if store is None else store.statistics().to_dict(),
        warnings=tuple(str(one.message) for one in caught),
    )


def _options(
    ram: str | None, vram: str | None, prompt: int, new: int, temperature: float
) -> list[str]:
    budgets = [
        part for name, size in (("--ram", ram), ("--vram", vram)) if size for part in (name, size)
    ]
    return [*budgets, "--prompt", str(prompt), "--new", str(new), "--temperature", str(temperature)]


def _rates(device: torch.device, directory: Path) -> Rates:
    """What the memories do, measured now; without a GPU its two are the host's."""
    host = Rate(read_bandwidth(torch.device("cpu")), "measured")
    disk = Rate(disk_bandwidth(directory), "measured")
    if device.type == "cpu":
        return Rates(device=host, interconnect=host, host=host, disk=disk)
    own, interconnect = (
        Rate(copy_bandwidth(device), "measured"),
        Rate(interconnect_bandwidth(device), "measured"),
    )
    return Rates(device=own, interconnect=interconnect, host=host, disk=disk)


def _seconds(
    directory: Path,
    model: MixtralForCausalLM,
    ram: str | None,
    vram: str | None,
    context: int,
    rates: Rates,
) -> float:
    """The least time of a step that meets its experts as this run did."""
    gpu, store = model.device.type == "cuda", model.store
    planned = plan.plan(
        read_metadata(directory),
        gpu=gpu,
        ram=None if ram is None else parse_size(ram, where="ram"),
        vram=None if vram is None else parse_size(vram, where="vram"),
        context=context,
    )
    if store is None:
        return planned.step_cost.seconds("resident" if gpu else "host", rates)
    hit = store.statistics().hit_rate
    if gpu:
        path: roofline.DecodePath = "cpu" if store.statistics().path == "cpu" else "interconnect"
        return replace(planned.step_cost, hit=hit).seconds(path, rates)
    return replace(planned.step_cost, hit=hit, cold=1 - hit).seconds("host and disk", rates)


def _ballast(vram: str | None) -> torch.Tensor | None:
    """What holds the rest of a GPU's memory, so that the budget is all that is left."""
    if vram is None or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    rest = max(0, free - parse_size(vram, where="vram"))
    return torch.empty(rest, dtype=torch.uint8, device="cuda")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.offload", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram")
    parser.add_argument("--vram")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        record = run(
            options.directory,
            ram=options.ram,
            vram=options.vram,
            prompt=options.prompt,
            new=options.new,
            temperature=options.temperature,
        )
        sys.stdout.write(f"{record}\n")
        if options.json is not None:
            options.json.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
        if not record.within:
            raise QualityError(
                "the process went over its budget of host memory",
                expected=f"at most {show(record.ram or 0)}",
                found=show(record.peak_host_bytes),
            )
    except QmixError as error:
        sys.stderr.write(f"offload: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
