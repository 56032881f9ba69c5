"""The command line in a process of its own."""

import io
import os
import subprocess
import sys

from rich.console import Console

from qmix.commands.repl import Repl, Streams
from qmix.commands.session import Session
from qmix.generation.config import GenerationConfig
from qmix.planning.machine import Gpu
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import ROOT, TINY, small_model

QMIX = [sys.executable, "-W", "error", "-m", "qmix"]


def qmix(*arguments, stdin=None, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [*QMIX, *map(str, arguments)],
        cwd=options.pop("cwd", ROOT),
        env=environment,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


GIB = 1 << 30
CARD = Gpu(
    name="NVIDIA GeForce RTX 3090",
    total=24 * GIB,
    free=23 * GIB,
    driver="550.54",
    capability=(8, 6),
)


def run(lines):
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    model = small_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    session = Session(model, tokenizer, GenerationConfig(max_new_tokens=5, eos_token_id=2))
    text, notices = io.StringIO(), io.StringIO()
    console = Console(file=notices, width=200, color_system=None)
    Repl(session, Streams(io.StringIO(lines), text, console)).run()
    return session, text.getvalue(), notices.getvalue()
