"""The file of the compiled kernels: cached, compiled, shared, damaged, or impossible to compile."""

import os
import re
import stat
import subprocess
import sys
import warnings

import pytest
import torch

from qmix import kernels
from qmix.errors import ResourceError, UsageError
from qmix.kernels.cpu import build
from qmix.kernels.cpu.isa import VARIABLE
from qmix.kernels.cpu.library import library
from qmix.quantize.rounding.nf4 import quantize
from tests.support.models import ROOT

try:
    build._compiler()
    COMPILES = True
except ResourceError:
    COMPILES = False
needs_compiler = pytest.mark.skipif(not COMPILES, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory; the library is found anew in it, and elsewhere after it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # four times as fast
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
    files = [build.compiled(tmp_path / "cache") for _ in range(2)]
    small.with_name("part.h").write_text("// included")
    files.append(build.compiled(tmp_path / "cache"))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    files.append(build.compiled(tmp_path / "cache"))
    real = build._compiler()[0]
    text = f'[ "$1" = --version ] && echo other && exit 0; exec {real} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "other", text))
    files.append(build.compiled(tmp_path / "cache"))
    assert files[0] == files[1]
    assert len(set(files)) == 4
    assert set((tmp_path / "cache").iterdir()) == set(files)


@needs_compiler
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_damaged_file_is_compiled_anew(small, tmp_path, keep):
    path = build.compiled(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert build.compiled(tmp_path) == path
    assert path.read_bytes() == whole
    path.write_bytes(whole[:50] + b"?" + whole[51:])
    assert build.compiled(tmp_path) == path
    assert path.read_bytes() == whole


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named_and_done_without(cache, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match=r"cache/qmix: .* XDG_CACHE_HOME"):
        multiply()
    assert library().isa is not None
    assert not library().fallbacks


@pytest.mark.slow
@needs_compiler
def test_two_processes_at_once_both_end_with_it(cache):
    code = (
        "import torch; from qmix.kernels.cpu import build; build.FLAGS = ('-O0', *build.FLAGS[1:]);"
        "from qmix.kernels.cpu.library import library; assert library().isa is not None"
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
    with pytest.raises(UsageError, match="portable, avx2, avx512, vnni"):
        library()


def test_torch_by_choice_is_no_reason_to_warn(cache, monkeypatch):
    monkeypatch.setenv(VARIABLE, "torch")
    multiply()
    assert library().fallbacks == 1
    assert not cache.exists()


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_directory() == tmp_path / "qmix"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.cache_directory() == tmp_path / "home" / ".cache" / "qmix"
    assert os.path.isabs(build.cache_directory())
