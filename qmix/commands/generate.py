"""`qmix generate`: a text that a model continues, to stdout.

Heavy imports stay inside the functions.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import CUT_REPLY, UsageError
from qmix.generation.config import CONTINUATION
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix import GenerationConfig, LlamaTokenizer
    from qmix.generation.draft_counts import DraftCounts
    from qmix.generation.loop import Token

NewTokens = Annotated[
    int | None,
    typer.Option(
        parser=options.token_count,
        help="New tokens at most.",
        show_default="the checkpoint's, or 256",
    ),
]


@options.grouped
def generate(
    directory: options.Directory,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="The text to continue; - reads stdin, less one newline."
        ),
    ],
    max_new_tokens: NewTokens = None,
    sampling: options.Sampling = options.SAMPLING,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask it as a user does in a chat, by the template.")
    ] = False,
    template: options.Template = None,
    ctx: options.Context = None,
    reuse: options.Reuse = options.REUSE,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Continue a prompt once; the new text goes to stdout.

    What you do not give is taken from the checkpoint's generation_config.json; without that the
    choice is greedy. With --chat, exit 6 if the reply was cut short.

    Examples:
      qmix generate mixtral-nf4 "My favourite condiment is" --max-new-tokens 50
      qmix generate mixtral-nf4 - --temperature 0.7 < prompt.txt
    """
    config = sampling.parse(max_new_tokens)
    directory = sources.local(directory, yes=yes)
    context = sources.checked_context(directory, ctx, default=load.context(None))
    import torch

    import qmix
    from qmix.commands.load_bar import load_bar
    from qmix.generation.inputs import GenerationInputs
    from qmix.generation.loop import stream

    prompts, load_options = reuse.prompts(directory), load.parse(ctx)
    text = _stdin() if prompt == "-" else prompt
    with load_bar(quiet=quiet) as bar:
        model, tokenizer = qmix.load(directory, load_options=load_options, progress=bar)
    config = config.filled_from(model.generation_config).filled_from(CONTINUATION)
    chat = chat or template is not None
    ids, ends = _asked(tokenizer, text, template) if chat else (tokenizer.encode(text), ())
    config = _fitting(reuse.drafting(config.with_ends(ends), model), len(ids), context)
    cache, begun = model.new_cache(1, len(ids)), time.perf_counter()
    cached = 0 if prompts is None else prompts.restore(cache, ids)
    inputs = GenerationInputs(
        torch.tensor([ids]), config, cache=cache, tokenizer=tokenizer, starts_new_text=chat
    )
    done, new = _written(stream(model, inputs), len(ids), cached, begun, as_json=as_json)
    if prompts is not None:
        prompts.keep(cache, [*ids, *new])
    if not quiet and not as_json:
        terminal.notice(str(done))
    if chat and done.finish == "length":
        raise typer.Exit(CUT_REPLY)


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A text that was generated; seconds from its ids on, with what a folder of prompts took."""

    text: str
    finish: str
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token_s: float
    elapsed_s: float
    drafts: "DraftCounts | None"

    def __str__(self) -> str:
        rate = self.new_tokens / self.elapsed_s
        ended = " · ended by length" if self.finish == "length" else ""
        return f"{counted(self.new_tokens, 'token')} in {self.elapsed_s:.2f} s ({rate:.1f} tok/s){ended}"


def _written(
    tokens: "Iterable[Token]",
    prompt_tokens: int,
    cached_tokens: int,
    begun: float,
    *,
    as_json: bool,
) -> tuple[Continuation, list[int]]:
    """Write tokens to stdout as they come, or at the end as JSON; returns their ids too."""
    pieces, ids, first_s, last = [], [], 0.0, None
    for last in tokens:
        ids.append(int(last.ids))
        pieces.append(last.texts[0])
        first_s = first_s or time.perf_counter() - begun
        if not as_json:
            terminal.write(pieces[-1])
    assert last is not None
    assert last.finish is not None
    done = Continuation(
        text="".join(pieces),
        finish=last.finish,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        new_tokens=len(pieces),
        first_token_s=first_s,
        elapsed_s=time.perf_counter() - begun,
        drafts=last.drafts,
    )
    if as_json:
        terminal.print_json(asdict(done))
    else:
        terminal.write("\n")
    return done, ids


def _stdin() -> str:
    """The text on stdin without the newline that `echo` ends it with."""
    terminal.decode_utf8(sys.stdin)
    return sys.stdin.read().removesuffix("\n")


def _asked(
    tokenizer: "LlamaTokenizer", text: str, template: str | None
) -> tuple[list[int], tuple[int, ...]]:
    """The ids of a user's message, and what ends a reply to it."""
    from qmix.text.chat_format import chat_format
    from qmix.text.chat_template import Message

    form = chat_format(tokenizer, template)
    return form.prompt([Message("user", text)]), form.end_ids


def _fitting(config: "GenerationConfig", prompt: int, context: int) -> "GenerationConfig":
    """The configuration with no more new tokens than the context holds.

    Raises:
        UsageError: the prompt leaves none, or fewer than the command line asks for.
    """
    new, space = config.new_tokens(prompt), context - prompt
    if new <= space:
        return config
    if space > 0 and config.given["max_new_tokens"] != options.GIVEN:
        return config.updated({"max_new_tokens": space})
    raise UsageError(
        "the prompt and the new tokens exceed the context",
        where="--ctx",
        expected=f"at most {context}",
        found=f"{prompt} + {new}",
        remedy="Shorten the prompt, lower --max-new-tokens, or give a larger --ctx.",
    )
