"""Paths that no file has, and things that are no file, given to every command."""

import os

import pytest

from tests.support.models import TINY
from tests.support.process import qmix

TEXT = "a" * 300


@pytest.fixture(params=["long name", "long path", "pipe", "device"])
def odd(request, tmp_path):
    if request.param == "pipe":
        os.mkfifo(tmp_path / "pipe")
    return {
        "long name": TEXT,
        "long path": "a/" * 3000,
        "pipe": tmp_path / "pipe",
        "device": "/dev/zero",
    }[request.param]


COMMANDS = {
    "quantize SRC": lambda odd, out: ("quantize", odd, out),
    "quantize OUT": lambda odd, out: ("quantize", TINY, odd),
    "calibration": lambda odd, out: (
        *("quantize", TINY, out, "--method", "gptq", "--calibration", odd),
    ),
    "convert": lambda odd, out: ("convert", odd, out),
    "export": lambda odd, out: ("export", odd, out, "--format", "gptq"),
    "generate": lambda odd, out: ("generate", odd, "x"),
    "chat": lambda odd, out: ("chat", odd),
    "eval": lambda odd, out: ("eval", odd, "--data", "README.md"),
    "data": lambda odd, out: ("eval", TINY, "--data", odd),
    "bench": lambda odd, out: ("bench", odd),
    "inspect": lambda odd, out: ("inspect", odd),
    "verify": lambda odd, out: ("verify", odd),
    "plan": lambda odd, out: ("plan", odd),
    "trace record": lambda odd, out: ("trace", "record", TINY, "--data", odd, "--out", out),
    "trace out": lambda odd, out: ("trace", "record", TINY, "x", "--out", odd),
    "trace replay": lambda odd, out: ("trace", "replay", odd, "--slots", "1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_odd_path_is_refused_by_name(odd, name, tmp_path):
    done = qmix(*COMMANDS[name](odd, tmp_path / "out"))
    assert done.returncode in (2, 3, 4), done.stderr  # 4: OUT cannot be written
    assert done.stderr.count("\n") <= 2
    assert "(--debug" not in done.stderr
    assert not (tmp_path / "out").exists()
