"""`qmix generate` and `qmix chat`: a model that writes to stdout.

Heavy imports stay inside the functions.
"""

import sys
from typing import Annotated

import typer

from qmix.commands import options, terminal
from qmix.errors import UsageError


def generate(
    directory: options.Directory,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.Penalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in [INST] tags.")] = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
) -> None:
    """Continue a prompt once; the new text goes to stdout.

    \b
    Example:
      qmix generate mixtral-nf4 "My favourite condiment is" --max-new-tokens 50
    """
    config = options.generation_config(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop
    )
    import torch

    import qmix
    from qmix.generation.inputs import GenerationInputs
    from qmix.generation.loop import stream
    from qmix.text import chat_template
    from qmix.text.printable import printable

    load_options = qmix.LoadOptions(dtype=dtype, device=device, vram=vram, ram=ram)
    text = _stdin() if prompt == "-" else prompt
    model, tokenizer = qmix.load(directory, load_options=load_options)
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
        sys.stdout.write(printable(token.texts[0]))
        sys.stdout.flush()
        count, seconds = count + 1, token.elapsed_s
    sys.stdout.write("\n")
    terminal.notice(f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tok/s)")


def chat(
    directory: options.Directory,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    ctx: Annotated[
        int | None, typer.Option(help="Context in tokens.", show_default="the model's")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 1024,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.05,
    repetition_penalty: options.Penalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
) -> None:
    """Talk to a model; from a pipe every line is a message.

    \b
    Examples:
      qmix chat mixtral-nf4
      echo "What is NF4?" | qmix chat mixtral-nf4
    """
    config = options.generation_config(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop
    )
    if sys.stdin.isatty():
        terminal.enable_ctrl_c()
    import qmix
    from qmix.commands.repl import Repl, Streams
    from qmix.commands.session import Session

    load_options = qmix.LoadOptions(dtype=dtype, device=device, vram=vram, ram=ram, max_context=ctx)
    model, tokenizer = qmix.load(directory, load_options=load_options)
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
