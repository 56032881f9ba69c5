"""The file of the compiled kernels: cached, compiled, shared, damaged, or impossible to compile."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch

from qmix import instruction_sets, kernels
from qmix.errors import ResourceError, UsageError
from qmix.instruction_sets import ISAS, VARIABLE, of_architecture, supported
from qmix.kernels.cpu import build
from qmix.kernels.cpu.library import library
from qmix.weights.nf4 import quantize
from tests.support.models import ROOT
from tests.support.process import PATIENCE

try:
    build._compiler()
    COMPILES = True
except ResourceError:
    COMPILES = False
BEST = supported()[0]
needs_compiler = pytest.mark.skipif(not COMPILES, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory; the library is found anew in it, and elsewhere after it."""
    with monkeypatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        patched.delenv(VARIABLE, raising=False)
        patched.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # four times as fast
        library.cache_clear()
        yield tmp_path / "cache" / "qmix"
    library.cache_clear()


def multiply():
    weight = quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
    x = torch.ones(2, 128)
    oracle = x @ weight.dequantize(torch.float32).T
    assert torch.allclose(kernels.linear(x, weight), oracle, atol=1e-4)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@needs_compiler
def test_it_is_compiled_once_and_found_again(cache, monkeypatch):
    multiply()
    (library_file,) = cache.iterdir()  # and nothing of the compilation is left
    assert library_file.suffix == ".so"
    before = library_file.stat().st_mtime_ns
    library.cache_clear()
    multiply()
    assert library_file.stat().st_mtime_ns == before
    assert library().isa is not None
    assert not library().fallbacks


@needs_compiler
def test_threads_that_need_it_at_once_load_it_once(monkeypatch):
    """While the first loads it, which takes its time, the others wait."""
    begun, ready, load = [], Barrier(4), build.load

    def slow_load(isas):
        begun.append(None)
        time.sleep(0.5)
        return load(isas)

    def first(_):
        ready.wait(60)
        return library()

    monkeypatch.setattr(build, "load", slow_load)
    library.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(first, range(4)))
    assert all(each is found[0] for each in found)
    assert len(begun) == 1


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A source that compiles in no time, in place of the package's."""
    source = tmp_path / "source" / "kernels.cpp"
    source.parent.mkdir()
    source.write_text("int answer = 42;")
    monkeypatch.setattr(build, "SOURCE", source)
    return source


@needs_compiler
def test_another_source_flag_or_compiler_is_another_file(small, monkeypatch, tmp_path):
    files = [build.compiled(tmp_path / "cache", BEST) for _ in range(2)]
    small.with_name("part.h").write_text("// included")
    files.append(build.compiled(tmp_path / "cache", BEST))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    files.append(build.compiled(tmp_path / "cache", BEST))
    real = build._compiler()[0]
    text = f'[ "$1" = --version ] && echo other && exit 0; exec {real} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "other", text))
    files.append(build.compiled(tmp_path / "cache", BEST))
    assert files[0] == files[1]
    assert len(set(files)) == 4
    assert set((tmp_path / "cache").iterdir()) == set(files)


@needs_compiler
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_file_is_compiled_anew(small, tmp_path, keep):
    path = build.compiled(tmp_path, BEST)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert build.compiled(tmp_path, BEST) == path
    assert path.read_bytes() == whole
    path.write_bytes(whole[:50] + b"?" + whole[51:])
    assert build.compiled(tmp_path, BEST) == path
    assert path.read_bytes() == whole


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named_and_done_without(cache, small, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match=r"cache/qmix: .* XDG_CACHE_HOME"):
        loaded, _ = build.load([BEST])
    assert ctypes.c_int.in_dll(loaded, "answer").value == 42


PLANTED = "__attribute__((constructor)) static void run() { __builtin_trap(); }"


@pytest.fixture
def planted(small, tmp_path):
    """A library that nobody may load, whole by its own hash, and the name that qmix looks for."""
    name = build.compiled(tmp_path / "honest", BEST).name
    folder = tmp_path / "elsewhere"
    folder.mkdir(mode=0o700)
    (folder / "evil.cpp").write_text(PLANTED)
    library_file = folder / name
    compiler = build._compiler()
    subprocess.run([*compiler, "-shared", "-o", library_file, folder / "evil.cpp"], check=True)
    data = library_file.read_bytes()
    library_file.write_bytes(data + hashlib.sha256(data).digest())
    library_file.chmod(0o700)
    return library_file


@needs_compiler
@pytest.mark.parametrize(
    "place", ["folder for all", "folder of others", "base for all", "folder link"]
)
def test_a_library_where_others_can_write_is_never_loaded(planted, tmp_path, monkeypatch, place):
    base = tmp_path / "cache"
    folder = base / "qmix"
    base.mkdir(mode=0o700)
    if place == "folder link":
        folder.symlink_to(planted.parent)
    else:
        folder.mkdir(mode=0o700)
        shutil.copy(planted, folder)
    if place == "folder for all":
        folder.chmod(0o777)
    if place == "base for all":
        base.chmod(0o770)
    if place == "folder of others":
        disown(folder, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    before = (folder / planted.name).read_bytes()
    with pytest.warns(RuntimeWarning, match=r"cannot be trusted.*Make the folder yours") as said:
        loaded, _ = build.load([BEST])
    assert len(said) == 1
    assert ctypes.c_int.in_dll(loaded, "answer").value == 42
    assert (folder / planted.name).read_bytes() == before


def disown(path, monkeypatch):
    """Let a path belong to another user, as far as `Path.stat` says."""
    real = Path.stat

    def stat_of(self, **options):
        found = real(self, **options)
        if self == path:
            found = os.stat_result((*found[:4], 12345, *found[5:]))
        return found

    monkeypatch.setattr(Path, "stat", stat_of)


@needs_compiler
@pytest.mark.parametrize("kind", ["link", "writable", "of others"])
def test_a_library_that_others_can_have_written_is_compiled_anew(
    planted, tmp_path, monkeypatch, kind
):
    folder = tmp_path / "cache" / "qmix"
    folder.mkdir(parents=True, mode=0o700)
    path = folder / planted.name
    if kind == "link":
        path.symlink_to(planted)
    else:
        shutil.copy(planted, path)
    if kind == "writable":
        path.chmod(0o666)
    with monkeypatch.context() as patched:
        if kind == "of others":
            disown(path, patched)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert build.compiled(folder, BEST) == path
    assert ctypes.c_int.in_dll(build.load([BEST])[0], "answer").value == 42
    assert not path.is_symlink()
    assert planted.is_file()


@needs_compiler
def test_a_relative_cache_is_ignored(planted, tmp_path, monkeypatch):
    (tmp_path / "relative" / "qmix").mkdir(parents=True)
    shutil.copy(planted, tmp_path / "relative" / "qmix")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ctypes.c_int.in_dll(build.load([BEST])[0], "answer").value == 42
    assert (tmp_path / "home" / ".cache" / "qmix" / planted.name).is_file()


@needs_compiler
def test_what_a_killed_compilation_left_is_cleared_and_a_living_one_is_not(small, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    (folder / ".compiling-dead").mkdir()
    (folder / ".compiling-dead" / "half.so").write_text("half")
    with build._workplace(folder) as alive:
        path = build.compiled(folder, BEST)
        assert set(folder.iterdir()) == {path, alive}
    (folder / ".compiling-dead").mkdir()
    build.compiled(folder, BEST)  # which finds the library
    assert list(folder.iterdir()) == [path]


def test_a_compiler_that_takes_too_long_ends_with_its_children(monkeypatch, tmp_path):
    child = tmp_path / "child"
    slow = script(tmp_path / "c++", f"sleep 600 & echo $! > {child}; wait")
    monkeypatch.setattr(build, "_TIMEOUT", 5)
    with pytest.raises(ResourceError, match="timed out"):
        build._run([slow])
    stat = Path(f"/proc/{child.read_text().strip()}/stat")

    def state():
        try:
            return stat.read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "gone"

    # Gone, or dead and not yet reaped by its new parent, once it has been given the signal.
    stop = time.monotonic() + PATIENCE
    while state() not in ("gone", "Z"):
        assert time.monotonic() < stop
        time.sleep(0.01)


@needs_compiler
def test_two_processes_at_once_both_end_with_it(cache, small, tmp_path, monkeypatch):
    """The compiler waits until both have asked it."""
    asked = tmp_path / "asked"
    asked.mkdir()
    wait = f"touch {asked}/$$; while [ $(ls {asked} | wc -l) -lt 2 ]; do sleep 0.1; done"
    text = f'[ "$1" = --version ] || {{ {wait}; }}; exec {build._compiler()[0]} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "waiting", text))
    code = (
        "import ctypes; from pathlib import Path; from qmix.kernels.cpu import build;"
        "from qmix.instruction_sets import supported;"
        f"build.SOURCE = Path({str(small)!r});"
        "assert ctypes.c_int.in_dll(build.load(supported())[0], 'answer').value == 42"
    )
    both = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=ROOT) for _ in range(2)
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("kind", ["missing", "named but missing", "broken", "makes no library"])
def test_without_a_working_compiler_torch_multiplies_and_says_so_once(
    cache, monkeypatch, tmp_path, kind
):
    reason = "no C\\+\\+ compiler"
    if kind == "missing":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    elif kind == "named but missing":
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
        reason = "does not run"
    elif kind == "broken":
        text = '[ "$1" = --version ] && exit 0; echo "fatal: no headers" >&2; exit 1'
        monkeypatch.setenv("CXX", script(tmp_path / "broken", text))
        reason = "fatal: no headers"
    else:
        text = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo nothing > "$2"; shift; done'
        monkeypatch.setenv("CXX", script(tmp_path / "liar", text))
        reason = "cannot be loaded"
    with pytest.warns(RuntimeWarning) as caught:
        multiply()
    said = [str(each.message) for each in caught if "tenth of the speed" in str(each.message)]
    assert len(said) == 1
    assert re.search(reason, said[0]), said
    assert "Install g++ or clang++" in said[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multiply()
    assert library().isa is None
    assert library().fallbacks == 2


def test_an_unknown_choice_is_refused(cache, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fastest")
    with pytest.raises(UsageError, match=r"torch, .*portable"):
        library()


@needs_compiler
def test_what_a_wheel_carries_is_loaded_without_a_compiler(cache, small, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    build.prebuild(platform.machine())
    carried = (tmp_path / "prebuilt" / platform.machine()).iterdir()
    names = {path.name.split("-")[1] for path in carried}
    assert names <= {each.name for each in of_architecture(platform.machine())}
    assert "portable" in names
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    loaded, name = build.load([ISAS["portable"]])
    assert (ctypes.c_int.in_dll(loaded, "answer").value, name) == (42, "portable")
    assert not cache.exists()
    small.write_text("int answer = 43;")  # what is carried is of other sources
    with pytest.raises(ResourceError, match="compiler"):
        build.load([ISAS["portable"]])
    monkeypatch.delenv("CXX")
    build.prebuilt(ISAS["portable"]).write_bytes(b"of another system")
    loaded, _ = build.load([ISAS["portable"]])
    assert ctypes.c_int.in_dll(loaded, "answer").value == 43


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no cross compiler for Arm")
def test_a_wheel_may_carry_libraries_of_another_architecture(small, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    build.prebuild("aarch64")
    carried = list((tmp_path / "prebuilt").glob("*/*.so"))
    assert {path.name.split("-")[1] for path in carried} == {"i8mm", "neon", "portable"}
    for path in carried:
        assert path.parent.name == "aarch64"
        assert path.read_bytes()[18:20] == b"\xb7\x00", "e_machine: EM_AARCH64"


@needs_compiler
def test_a_compiler_older_than_the_processor_gives_the_next_best(cache, tmp_path, monkeypatch):
    text = 'for each in "$@"; do [ "$each" = -mfuture ] && exit 1; done; exec '
    older = script(tmp_path / "older", f'{text}{build._compiler()[0]} "$@"')
    monkeypatch.setenv("CXX", older)
    future = replace(ISAS["portable"], name="future", flags=("-mfuture",))
    assert build.load([future, ISAS["portable"]])[1] == "portable"
    with pytest.raises(ResourceError, match="compiler failed"):
        build.load([future])


def test_the_best_that_a_processor_has_comes_first(monkeypatch, tmp_path):
    flags = ("avx2 fma f16c", "avx512f avx512bw avx512dq avx512vl", "avx512_vnni", "avx_vnni")
    matrices = "amx_tile amx_bf16"
    ranks = (
        ("", ["portable"]),
        (flags[0], ["avx2", "portable"]),
        (f"{flags[0]} {flags[3]}", ["avx_vnni", "avx2", "portable"]),
        (f"{flags[0]} {flags[1]}", ["avx512", "avx2", "portable"]),
        (" ".join(flags), ["vnni", "avx512", "avx_vnni", "avx2", "portable"]),
        ("avx512f avx512_vnni", ["portable"]),
        (f"{flags[0]} {matrices}", ["avx2", "portable"]),
        (
            " ".join((*flags, matrices)),
            ["amx", "vnni", "avx512", "avx_vnni", "avx2", "portable"],
        ),
    )
    monkeypatch.setattr(instruction_sets, "granted", lambda state: state == 18)
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(instruction_sets, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for found, expected in ranks:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {found} sse\n\n")
        assert [each.name for each in supported()] == expected
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    cpuinfo.write_text("Features\t: fp asimd asimddp i8mm\n")
    assert [each.name for each in supported()] == ["i8mm", "neon", "portable"]
    cpuinfo.unlink()
    assert [each.name for each in supported()] == ["neon", "portable"]


def test_what_the_system_refuses_is_passed_over_and_said_by_name(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {' '.join(ISAS['amx'].needs)}\n")
    monkeypatch.setattr(instruction_sets, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(instruction_sets, "granted", lambda _: False)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert [each.name for each in instruction_sets.candidates()][:2] == ["vnni", "avx512"]
    assert instruction_sets.refused() == ("amx",)
    monkeypatch.setenv(VARIABLE, "amx")
    with pytest.raises(UsageError, match="refuses"):
        instruction_sets.candidates()


def test_registers_that_no_processor_has_are_not_granted():
    assert not instruction_sets.granted(62)


def test_torch_by_choice_is_no_reason_to_warn(cache, monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    multiply()
    assert library().fallbacks == 1
    assert not cache.exists()
