"""`qmix demo`: the tiny Mixtral in 4 bits, what that costs, and a sample of its text.

Knows nothing of how any of it is shown.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import qmix
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream

PROMPT = "Return a new list containing"
NEW_TOKENS = 96


@contextmanager
def place(out: Path | None) -> Iterator[Path]:
    """Where the 4-bit checkpoint goes: `out`, or a directory that is removed at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        yield out or Path(scratch) / "tiny-nf4"


def sample(directory: Path) -> Iterator[str]:
    """PROMPT and what the model makes of it, in pieces; the same each time."""
    model, tokenizer = qmix.load(directory, device="cpu")
    ids = tokenizer.encode(PROMPT)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        top_p=0.95,
        seed=0,
        eos_token_id=model.generation_config.eos_token_id,
    )
    yield PROMPT
    for token in stream(model, GenerationInputs(torch.tensor([ids]), config, tokenizer=tokenizer)):
        yield token.texts[0]
