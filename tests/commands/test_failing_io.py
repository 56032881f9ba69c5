"""Disks that fail: every open, read, write, fsync and rename of every command that writes."""

import errno
import json
import os
import subprocess
import sys

import pytest

from qmix.errors import ResourceError
from qmix.kernels.cpu import build
from tests.support.models import ROOT
from tests.support.soak import both

KINDS = ("open", "read", "pread", "write", "short", "fsync", "rename", "unlink", "rmdir", "mkdir")
POINTS_APART = 29  # when it is no soak


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    try:
        compiler = build._compiler()
    except ResourceError:
        pytest.skip("no compiler for the library that makes calls fail")
    library = tmp_path_factory.mktemp("shim") / "fail_io.so"
    source = ROOT / "tests" / "support" / "fail_io.c"
    command = [*compiler, "-x", "c", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the library that makes calls fail cannot be compiled: {done.stderr[:200]}")
    return library


def swept(shim, root, command, number, every):
    root.mkdir()
    options = [root, command, str(number), str(every), *KINDS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.failing_io", *options],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@both
@pytest.mark.parametrize("command", ["quantize", "replace", "convert", "export", "save"])
def test_a_disk_that_fails_at_any_call_is_said_and_the_next_run_is_whole(
    shim, tmp_path, command, soak
):
    for number in (errno.EIO, errno.ENOSPC, errno.ESTALE) if soak else (errno.ENOSPC,):
        found = swept(shim, tmp_path / str(number), command, number, 1 if soak else POINTS_APART)
        assert [each["problems"] for each in found] == [[]] * len(KINDS)
        assert all(each["tried"] for each in found if each["kind"] in ("open", "write", "fsync"))
