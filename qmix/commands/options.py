"""The options that several commands share, each declared once, and what is made of them.

Knows no command. Heavy imports stay inside the functions.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmix.formats.files.shard_names import SHARD_BYTES

if TYPE_CHECKING:
    from qmix import GenerationConfig

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="Checkpoint directory.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]

# How a model is loaded
Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:1 or cpu.", show_default="the GPU if there is one")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32.", show_default="the checkpoint's"),
]
Vram = Annotated[
    str | None,
    typer.Option(help="GPU memory to use at most, such as 16GiB; other experts stay in RAM."),
]
Ram = Annotated[
    str | None,
    typer.Option(help="Host memory to use at most; other experts stay in the file."),
]

# How text is sampled
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the smallest set with this probability mass.")]
MinP = Annotated[
    float, typer.Option(help="Drop tokens below this fraction of the most likely token's.")
]
Penalty = Annotated[float, typer.Option(help="Above 1 discourages repetition.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampler.", show_default="random")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text here; may be repeated.")]

# How a checkpoint is written
ShardSize = Annotated[str, typer.Option(help="Largest output file: 5GB, 500MB.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")]

SHARD_SIZE = f"{SHARD_BYTES / 1e9:g}GB"


def shard_bytes(size: str) -> int:
    """The bytes of --shard-size.

    Raises:
        UsageError: not a size, or out of range.
    """
    from qmix.planning.byte_sizes import parse_size

    return parse_size(size, where="--shard-size", least=1 << 16, most=1 << 44)


def generation_config(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
) -> "GenerationConfig":
    """The sampling options, checked before a model is loaded.

    Raises:
        UsageError: one is out of its range.
    """
    from qmix import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature != 0,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_strings=stop or None,
    )
