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
    from qmix import GenerationConfig, LlamaTokenizer

Context = Annotated[
    int | None,
    typer.Option(
        parser=options.token_count, help="Context in tokens: 8k.", show_default="the model's"
    ),
]
LongestReply = Annotated[
    int | None,
    typer.Option(
        parser=options.token_count,
        help="Longest reply, in tokens.",
        show_default="the checkpoint's, or 1024",
    ),
]
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
        typer.Option(
            parser=options.token_count,
            help="New tokens at most.",
            show_default="the checkpoint's, or 256",
        ),
    ] = None,
    sampling: options.Sampling = options.SAMPLING,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user does in a chat, by the template.")
    ] = False,
    template: options.Template = None,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Continue a prompt once; the new text goes to stdout.

    What you do not give is taken from the checkpoint's generation_config.json; without that the
    choice is greedy.

    Examples:
      qmix generate mixtral-nf4 "My favourite condiment is" --max-new-tokens 50
      qmix generate mixtral-nf4 - --temperature 0.7 < prompt.txt
    """
    config = sampling.parse(max_new_tokens)
    directory = sources.local(directory, yes=yes)
    import torch

    import qmix
    from qmix.generation.inputs import GenerationInputs
    from qmix.generation.loop import stream

    load_options = load.parse()
    text = _stdin() if prompt == "-" else prompt
    model, tokenizer = qmix.load(directory, load_options=load_options)
    config = config.filled_from(model.generation_config).filled_from(_defaults(_GENERATE))
    chat = chat or template is not None
    ids, ends = _asked(tokenizer, text, template) if chat else (tokenizer.encode(text), ())
    config = _ending(config, ends)
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
    template: options.Template = None,
    ctx: Context = None,
    max_new_tokens: LongestReply = None,
    sampling: options.Sampling = options.SAMPLING,
    plain: Annotated[
        bool, typer.Option("--plain", help="Write replies as they are; do not draw Markdown.")
    ] = False,
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
    from qmix.text.chat_format import INST_NAME, chat_format

    load_options = load.parse(max_context=ctx)
    model, tokenizer = qmix.load(directory, load_options=load_options)
    config = config.filled_from(model.generation_config).filled_from(_defaults(_CHAT))
    form = chat_format(tokenizer, template)
    config = _ending(config, form.end_ids)
    session = Session(model, tokenizer, config, chat_format=form, system=system, context=ctx)
    if sys.stdin.isatty() or form.name != INST_NAME:
        terminal.notice(f"template: {form.name}")
    terminal.decode_utf8(sys.stdin)
    Repl(session, Streams(sys.stdin, sys.stdout, terminal.console(), plain)).run()


def _stdin() -> str:
    """The text on stdin without the newline that `echo` ends it with."""
    terminal.decode_utf8(sys.stdin)
    return sys.stdin.read().removesuffix("\n")


def _defaults(values: Mapping[str, Any]) -> "GenerationConfig":
    from qmix import GenerationConfig

    return GenerationConfig(**values).attributed("qmix")


def _asked(
    tokenizer: "LlamaTokenizer", text: str, template: str | None
) -> tuple[list[int], tuple[int, ...]]:
    """The ids of a user's message, and what ends a reply to it."""
    from qmix.text.chat_format import chat_format
    from qmix.text.chat_template import Message

    form = chat_format(tokenizer, template)
    return form.prompt([Message("user", text)]), form.end_ids


def _ending(config: "GenerationConfig", ends: tuple[int, ...]) -> "GenerationConfig":
    """The configuration with more ids that end the text."""
    new = [index for index in ends if index not in config.eos_ids]
    return config.updated({"eos_token_id": [*config.eos_ids, *new]}) if new else config


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
