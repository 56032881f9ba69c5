"""`qmix generate` and `qmix chat`: a model that writes to stdout.

Heavy imports stay inside the functions.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import UsageError

if TYPE_CHECKING:
    from qmix import GenerationConfig

# What neither the command line nor the checkpoint's generation_config.json says.
_GENERATE: Mapping[str, Any] = {"do_sample": False, "top_k": 0, "max_new_tokens": 256}
_CHAT: Mapping[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 0,
    "min_p": 0.05,
    "max_new_tokens": 1024,
}


@options.grouped
def generate(
    directory: options.Directory,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="The text to continue; - reads stdin, less one newline."
        ),
    ],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="New tokens at most.", show_default="the checkpoint's, or 256"),
    ] = None,
    sampling: options.Sampling = options.SAMPLING,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in [INST] tags.")] = False,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Continue a prompt once; the new text goes to stdout.

    What you do not give is taken from the checkpoint's generation_config.json; without that the
    choice is greedy.

    \b
    Example:
      qmix generate mixtral-nf4 "My favourite condiment is" --max-new-tokens 50
    """
    config = sampling.parse(max_new_tokens)
    directory = sources.local(directory, yes=yes)
    import torch

    import qmix
    from qmix.generation.inputs import GenerationInputs
    from qmix.generation.loop import stream
    from qmix.text import chat_template

    load_options = load.parse()
    text = _stdin() if prompt == "-" else prompt
    model, tokenizer = qmix.load(directory, load_options=load_options)
    if chat:
        ids = chat_template.encode([chat_template.Message("user", text)], tokenizer)
    else:
        ids = tokenizer.encode(text)
    config = config.filled_from(model.generation_config).filled_from(_defaults(_GENERATE))
    config = _fitting(config, len(ids), model.config.max_position_embeddings)
    count, seconds = 0, 0.0
    inputs = GenerationInputs(
        torch.tensor([ids]), config, tokenizer=tokenizer, starts_new_text=chat
    )
    for token in stream(model, inputs):
        terminal.write(token.texts[0])
        count, seconds = count + 1, token.elapsed_s
    terminal.write("\n")
    terminal.notice(f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tok/s)")


@options.grouped
def chat(
    directory: options.Directory,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    ctx: Annotated[
        int | None, typer.Option(help="Context in tokens.", show_default="the model's")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Longest reply, in tokens.", show_default="the checkpoint's, or 1024"),
    ] = None,
    sampling: options.Sampling = options.SAMPLING,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Talk to a model; from a pipe every line is a message.

    What you do not give is taken from the checkpoint's generation_config.json, and else from
    temperature 0.7 and min-p 0.05; /set shows which.

    \b
    Examples:
      qmix chat mixtral-nf4
      echo "What is NF4?" | qmix chat mixtral-nf4
    """
    config = sampling.parse(max_new_tokens)
    directory = sources.local(directory, yes=yes)
    if sys.stdin.isatty():
        terminal.enable_ctrl_c()
    import qmix
    from qmix.commands.repl import Repl, Streams
    from qmix.commands.session import Session

    load_options = load.parse(max_context=ctx)
    model, tokenizer = qmix.load(directory, load_options=load_options)
    config = config.filled_from(model.generation_config).filled_from(_defaults(_CHAT))
    session = Session(model, tokenizer, config, system=system, context=ctx)
    terminal.decode_utf8(sys.stdin)
    Repl(session, Streams(sys.stdin, sys.stdout, terminal.console())).run()


def _stdin() -> str:
    """The text on stdin without the newline that `echo` ends it with."""
    terminal.decode_utf8(sys.stdin)
    return sys.stdin.read().removesuffix("\n")


def _defaults(values: Mapping[str, Any]) -> "GenerationConfig":
    from qmix import GenerationConfig

    return GenerationConfig(**values).attributed("qmix")


def _fitting(config: "GenerationConfig", prompt: int, positions: int) -> "GenerationConfig":
    """The configuration with no more new tokens than the model has positions for.

    Raises:
        UsageError: the prompt leaves none, or fewer than the command line asks for.
    """
    new, space = config.new_tokens(prompt), positions - prompt
    if new <= space:
        return config
    if space > 0 and config.given["max_new_tokens"] != options.GIVEN:
        return config.updated({"max_new_tokens": space})
    raise UsageError(
        "the prompt and the new tokens exceed the model's positions",
        expected=f"at most {positions}",
        found=f"{prompt} + {new}",
        remedy="Shorten the prompt or lower --max-new-tokens.",
    )
