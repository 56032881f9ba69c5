"""What this machine has, and what would be slow or fail on it: a table of checks over facts.

`Facts.gather` looks at the machine; the checks look at the facts only. Knows nothing of torch but
its version and whether it sees a GPU; what would multiply there, the kernels say.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import qmix
from qmix import instruction_sets
from qmix.errors import UsageError
from qmix.planning import machine
from qmix.planning.byte_sizes import show
from qmix.planning.machine import Gpu, HostMemory
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix.kernels.choice import Verdict

Severity = Literal["ok", "slow", "fails", "note"]
Subject = TypeVar("Subject")

PACKAGES = (
    *("numpy", "sentencepiece", "tokenizers", "jinja2", "huggingface_hub"),
    *("triton", "bitsandbytes", "transformers", "flash_attn", "matplotlib"),
)
COMPILERS = ("c++", "g++", "clang++")  # of qmix.kernels.cpu.build, whose package needs torch
_OLDEST_TORCH, _NEWEST_TORCH = (2, 9), (2, 13)  # tested
_PICKLES_TORCH = (2, 10)
# An 8x7B in 4 bits: what its files take, and the least host memory it runs in.
_CHECKPOINT_BYTES, _LEAST_RAM = 25 << 30, 3 << 30


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was seen of this machine.

    Attributes:
        folder: where disk space was looked at.
        versions: of torch and PACKAGES; None: not installed.
        instruction_sets: those that the CPU kernels may use, the best one first.
        nodes: the NUMA nodes that this process may run on, as in machine.numa_nodes.
        compiler: the command that compiles the CPU kernels; None: it is not there.
        torch_sees_cuda: whether this torch can use a GPU.
        backends: what would multiply on the CPU and on each GPU; empty without torch.
    """

    folder: Path
    versions: Mapping[str, str | None]
    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    compiler: str | None
    memory: HostMemory
    disk_free: int
    gpus: tuple[Gpu, ...]
    torch_sees_cuda: bool
    backends: tuple["Verdict", ...] = ()
    nodes: tuple[int, ...] = ()

    @classmethod
    def gather(cls, folder: Path) -> "Facts":
        """Look at this machine, and at the disk below `folder`."""
        versions = {name: _version(name) for name in ("torch", *PACKAGES)}
        return cls(
            folder=folder,
            versions=versions,
            processor=machine.processor(),
            instruction_sets=_instruction_sets(),
            cores=machine.cores(),
            nodes=machine.numa_nodes(),
            compiler=_compiler(),
            memory=machine.memory(),
            disk_free=machine.disk_free(folder),
            gpus=machine.gpus(),
            torch_sees_cuda=versions["torch"] is not None and _torch_sees_cuda(),
            backends=() if versions["torch"] is None else _backends(),
        )

    @property
    def torch(self) -> tuple[int, ...] | None:
        """Torch's version, (major, minor)."""
        version = self.versions["torch"]
        if version is None:
            return None
        parts = version.split("+")[0].split(".")[:2]
        return tuple(int(part) for part in parts if part.isdecimal())


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was looked at, what is there and, unless all is well, the remedy."""

    what: str
    found: str
    state: Severity = "ok"
    remedy: str | None = None


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """What is said where `applies` holds."""

    applies: Callable[[Subject], bool]
    state: Severity
    remedy: str | None = None


@dataclass(frozen=True)
class Check(Generic[Subject]):
    """One line of the table.

    Attributes:
        what: its name.
        probe: what is there, in words; None: nothing to report.
        rules: the first that applies decides; all is well if none does.
    """

    what: str
    probe: Callable[[Subject], str | None]
    rules: tuple[Rule[Subject], ...] = ()

    def findings(self, subject: Subject) -> tuple[Finding, ...]:
        """One finding, or none."""
        found = self.probe(subject)
        if found is None:
            return ()
        rule = next((rule for rule in self.rules if rule.applies(subject)), None)
        if rule is None:
            return (Finding(what=self.what, found=found),)
        return (Finding(what=self.what, found=found, state=rule.state, remedy=rule.remedy),)


CHECKS: tuple[Check[Facts], ...] = (
    Check("qmix", lambda _: qmix.__version__),
    Check("python", lambda _: f"{platform.python_version()}, {sys.platform}"),
    Check(
        "torch",
        lambda facts: facts.versions["torch"] or "missing",
        (
            Rule(
                lambda facts: facts.torch is None,
                "fails",
                "Install it; only qmix plan, inspect and --help work without.",
            ),
            Rule(
                lambda facts: not _OLDEST_TORCH <= (facts.torch or ()) <= _NEWEST_TORCH,
                "note",
                "Tested with 2.9 to 2.13; another version may fail.",
            ),
            Rule(
                lambda facts: (facts.torch or ()) < _PICKLES_TORCH,
                "note",
                "qmix convert reads pickles with 2.10 or newer only (CVE-2026-24747).",
            ),
        ),
    ),
    Check(
        "processor",
        lambda facts: (
            f"{facts.processor}, {counted(facts.cores, 'core')}, "
            f"4-bit kernels for {_used(facts.instruction_sets)}"
        ),
        (
            Rule(
                lambda facts: (
                    not _is_fast(facts) and bool(os.environ.get(instruction_sets.VARIABLE))
                ),
                "slow",
                f"{instruction_sets.VARIABLE} says so; the fast kernels run where it is unset.",
            ),
            Rule(
                lambda facts: not _is_fast(facts),
                "slow",
                "The fast 4-bit CPU kernels need AVX2, or Arm's dot products of bytes.",
            ),
        ),
    ),
    Check(
        "NUMA",
        lambda facts: (
            f"{counted(len(facts.nodes), 'node')} of memory" if len(facts.nodes) > 1 else None
        ),
        (
            Rule(
                lambda _: True,
                "note",
                "Weights may all lie on one node, which the cores of the others then share: start "
                "with `numactl --interleave=all qmix ...`, or, if the model fits one node, with "
                "`numactl --cpunodebind=0 --membind=0 qmix ...`; see docs/speed.md.",
            ),
        ),
    ),
    Check(
        "compiler",
        lambda facts: facts.compiler or "none",
        (
            Rule(
                lambda facts: facts.compiler is None,
                "slow",
                "Install g++ or clang++, or name one that is there in $CXX: the 4-bit CPU kernels are "
                "compiled at first use.",
            ),
        ),
    ),
    Check(
        "host memory",
        lambda facts: (
            f"{show(facts.memory.available)} free of {show(facts.memory.total)}"
            + (" (limited by a control group)" if facts.memory.limit == "cgroup" else "")
        ),
        (
            Rule(
                lambda facts: facts.memory.available < _LEAST_RAM,
                "fails",
                "An 8x7B in 4 bits needs at least 3 GiB; close other programs.",
            ),
            Rule(
                lambda facts: facts.memory.available < _CHECKPOINT_BYTES,
                "note",
                "An 8x7B in 4 bits does not fit as a whole: without a GPU, experts are read from "
                "the disk (--ram).",
            ),
        ),
    ),
    Check(
        "disk",
        lambda facts: f"{show(facts.disk_free)} free in {facts.folder.resolve()}",
        (
            Rule(
                lambda facts: facts.disk_free < _CHECKPOINT_BYTES,
                "note",
                "An 8x7B takes 24 GB in 4 bits and 93 GB in 16.",
            ),
        ),
    ),
    Check(
        "GPU",
        lambda facts: None if facts.gpus else "none that nvidia-smi shows",
        (
            Rule(
                lambda _: True,
                "note",
                "Models run on the CPU; qmix plan DIR --card 3090 plans for a GPU.",
            ),
        ),
    ),
    Check(
        "CUDA",
        lambda facts: (
            "this torch sees no GPU" if facts.gpus and not facts.torch_sees_cuda else None
        ),
        (Rule(lambda _: True, "fails", "Install a torch built for CUDA, or a newer driver."),),
    ),
    Check("packages", lambda facts: _listed(facts, installed=True) or "none"),
    Check(
        "optional",
        lambda facts: (
            f"not installed: {missing}" if (missing := _listed(facts, installed=False)) else None
        ),
        (Rule(lambda _: True, "note"),),
    ),
)

GPU: Check[Gpu] = Check(
    "GPU",
    lambda gpu: (
        f"{gpu.name}, {show(gpu.free)} free of {show(gpu.total)}, compute capability "
        f"{gpu.capability[0]}.{gpu.capability[1]}, driver {gpu.driver}"
    ),
    (
        Rule(
            lambda gpu: gpu.capability < instruction_sets.LEAST_CAPABILITY,
            "slow",
            "The 4-bit kernels need compute capability 8.0; see the backend below.",
        ),
    ),
)


def _backend(verdict: "Verdict") -> Finding:
    """One line for a device: what multiplies there, or why nothing better does."""
    found = f"{verdict.device}: {verdict.backend or 'none'}"
    if verdict.refusal is None:
        return Finding(what="backend", found=found)
    error = verdict.refusal
    reason = type(error)(error.what, where=error.where, expected=error.expected, found=error.found)
    return Finding(
        what="backend",
        found=f"{found}, because {reason}",
        state="slow" if verdict.backend else "fails",
        remedy=error.remedy,
    )


def diagnose(facts: Facts) -> tuple[Finding, ...]:
    """All checks, then each GPU."""
    return (
        *(finding for check in CHECKS for finding in check.findings(facts)),
        *(finding for gpu in facts.gpus for finding in GPU.findings(gpu)),
        *map(_backend, facts.backends),
    )


def _is_fast(facts: Facts) -> bool:
    return facts.instruction_sets[:1] not in ((), ("portable",))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _instruction_sets() -> tuple[str, ...]:
    """The names of those that may be used; none where a variable names what is not there."""
    try:
        return tuple(each.name for each in instruction_sets.candidates())
    except UsageError:
        return ()  # the backend's finding says it


def _used(names: Sequence[str]) -> str:
    """The instruction set of the CPU kernels, and why it is that one."""
    forced = os.environ.get(instruction_sets.VARIABLE)
    if forced:
        return f"{forced} ({instruction_sets.VARIABLE})"
    best, *others = names
    reasons = [f"the best of it and {', '.join(others)}"] if others else []
    reasons += [f"the system refuses {name} its registers" for name in instruction_sets.refused()]
    return f"{best} ({'; '.join(reasons)})" if reasons else best


def _compiler() -> str | None:
    """$CXX if it is set, else the first of COMPILERS, as qmix.kernels.cpu.build chooses."""
    command = os.environ.get("CXX", "").split()
    if command:
        return " ".join(command) if shutil.which(command[0]) else None
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def _backends() -> tuple["Verdict", ...]:
    from qmix.kernels.choice import survey

    return survey()


def _torch_sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _listed(facts: Facts, *, installed: bool) -> str:
    names = [name for name in PACKAGES if (facts.versions[name] is not None) == installed]
    return ", ".join(f"{name} {facts.versions[name]}" if installed else name for name in names)
