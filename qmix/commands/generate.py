"""`qmix generate` and `qmix chat`: a model that writes to stdout.

Heavy imports stay inside the functions.
"""

import sys
from typing import Annotated

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import UsageError

_CHAT_SAMPLING = options.Sampling(temperature=0.7, min_p=0.05)


@options.grouped
def generate(
    directory: options.Directory,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    sampling: options.Sampling = options.GREEDY,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in [INST] tags.")] = False,
    load: options.Load = options.LOAD,
) -> None:
    """Continue a prompt once; the new text goes to stdout.

    \b
    Example:
      qmix generate mixtral-nf4 "My favourite condiment is" --max-new-tokens 50
    """
    config = sampling.parse(max_new_tokens)
    import torch

    import qmix
    from qmix.generation.inputs import GenerationInputs
    from qmix.generation.loop import stream
    from qmix.text import chat_template

    load_options = load.parse()
    text = _stdin() if prompt == "-" else prompt
    model, tokenizer = qmix.load(sources.local(directory), load_options=load_options)
    config = config.updated({"eos_token_id": model.generation_config.eos_token_id})
    if chat:
        ids = chat_template.encode([chat_template.Message("user", text)], tokenizer)
    else:
        ids = tokenizer.encode(text)
    _check_fit(len(ids), max_new_tokens, model.config.max_position_embeddings)
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
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 1024,
    sampling: options.Sampling = _CHAT_SAMPLING,
    load: options.Load = options.LOAD,
) -> None:
    """Talk to a model; from a pipe every line is a message.

    \b
    Examples:
      qmix chat mixtral-nf4
      echo "What is NF4?" | qmix chat mixtral-nf4
    """
    config = sampling.parse(max_new_tokens)
    if sys.stdin.isatty():
        terminal.enable_ctrl_c()
    import qmix
    from qmix.commands.repl import Repl, Streams
    from qmix.commands.session import Session

    load_options = load.parse(max_context=ctx)
    model, tokenizer = qmix.load(sources.local(directory), load_options=load_options)
    config = config.updated({"eos_token_id": model.generation_config.eos_token_id})
    session = Session(model, tokenizer, config, system=system, context=ctx)
    terminal.decode_utf8(sys.stdin)
    Repl(session, Streams(sys.stdin, sys.stdout, terminal.console())).run()


def _stdin() -> str:
    terminal.decode_utf8(sys.stdin)
    return sys.stdin.read()


def _check_fit(prompt: int, new: int, positions: int) -> None:
    if prompt + new > positions:
        raise UsageError(
            "the prompt and the new tokens exceed the model's positions",
            expected=f"at most {positions}",
            found=f"{prompt} + {new}",
            remedy="Shorten the prompt or lower --max-new-tokens.",
        )
