"""The options that several commands share, each declared once, alone or in groups.

A command takes a group as one parameter, under the decorator `grouped`. Knows no command. Heavy
imports stay inside the functions.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from qmix.errors import UsageError
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.models import option_names
from qmix.planning.byte_sizes import parse_count, parse_size

if TYPE_CHECKING:
    from qmix import GenerationConfig, LoadOptions, MixtralForCausalLM
    from qmix.generation.prompt_cache import PromptCache

_Value = TypeVar("_Value")

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="Folder, GGUF file, or ORG/NAME of the hub.", show_default=False
    ),
]


def token_count(text: str) -> int:
    """An option's number of tokens: 32768 or 32k.

    Raises:
        BadParameter: not a number of tokens.
    """
    return _parsed(lambda text: parse_count(text, where="tokens"), text)


def dtype_name(text: str) -> str:
    """An option's dtype by torch's name."""
    return _parsed(option_names.dtype_name, text)


def device_name(text: str) -> str:
    """An option's device by torch's name; whether there is one is found out later."""
    return _parsed(option_names.device_name, text)


def folder(text: str) -> Path:
    """An option's folder. An empty name, as of an unset variable, is not the working folder.

    Raises:
        BadParameter: it is empty.
    """
    if not text:
        raise typer.BadParameter("expected a folder; found nothing")
    return Path(text)


def byte_count(text: str) -> int:
    """An option's bytes: 24G, 500MB."""
    return _parsed(lambda text: parse_size(text, where="size"), text)


def _parsed(parse: Callable[[str], _Value], text: str) -> _Value:
    try:
        return parse(text)
    except UsageError as error:
        raise typer.BadParameter(f"expected {error.expected}; found {error.found}") from None


Yes = Annotated[bool, typer.Option("-y", "--yes", help="Download without asking.")]
# Panels of the help pages; see qmix.commands.help_page.
_MACHINE, _SAMPLING, _REQUESTS = "Device and memory", "Sampling", "Requests"
SERVED_CONTEXT = 4096  # of a prompt and its reply, where the model has as much

Device = Annotated[
    str | None,
    typer.Option(
        parser=device_name,
        help="gpu, cuda:1 or cpu.",
        show_default="the GPU if there is one",
        rich_help_panel=_MACHINE,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        parser=dtype_name,
        help="bf16, fp16 or fp32.",
        show_default="the checkpoint's",
        rich_help_panel=_MACHINE,
    ),
]
Backend = Annotated[
    Literal["auto", "qmix", "bitsandbytes", "torch"] | None,
    typer.Option(
        metavar="NAME",
        help="Whose code multiplies: auto, qmix, bitsandbytes or torch.",
        show_default="QMIX_BACKEND, or auto",
        rich_help_panel=_MACHINE,
    ),
]
KV = Annotated[
    Literal["16", "int8"] | None,
    typer.Option(
        help="Bits of keys and values in the cache: 16, or int8, which takes half the memory.",
        show_default="16",
        rich_help_panel=_MACHINE,
    ),
]
Slots = Annotated[
    int, typer.Option(min=1, max=16, help="Requests at a time.", rich_help_panel=_REQUESTS)
]
Context = Annotated[
    int | None,
    typer.Option(
        parser=token_count,
        help="Context in tokens: 8k.",
        show_default="the model's, or 4096 with --vram or --ram",
    ),
]
ServedContext = Annotated[
    int | None,
    typer.Option(
        parser=token_count,
        help="Tokens of a prompt and its reply: 8k.",
        show_default=f"{SERVED_CONTEXT}, or the model's",
        rich_help_panel=_REQUESTS,
    ),
]
ShardSize = Annotated[str, typer.Option(help="Largest output file: 5GB, 500MB.")]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE|inst",
        help="Chat template: one of the checkpoint's by name, a file of Jinja, or [INST].",
        show_default="the checkpoint's own, or [INST]",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")]
ScoredText = Annotated[Path, typer.Option(help="UTF-8 text file to score.", show_default=False)]
ScoredWindow = Annotated[
    int | None,
    typer.Option(
        parser=token_count,
        help="Tokens per window.",
        show_default="2048, or the model's positions",
    ),
]
RawText = Annotated[
    bool, typer.Option("--raw-text", help="Keep a byte-order mark and CRLF line ends.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but results and errors.")]

GIVEN = "the command line"  # who gave a field of a GenerationConfig
_STATED = "the checkpoint's"
SHARD_SIZE = f"{SHARD_BYTES / 1e9:g}GB"


@dataclass(frozen=True)
class Group:
    """Options that go together, each a field."""


@dataclass(frozen=True)
class Load(Group):
    """How a model is loaded, as written."""

    dtype: Dtype = None
    device: Device = None
    vram: Annotated[
        int | None,
        typer.Option(
            parser=byte_count,
            metavar="<size>",
            help="GPU memory to use at most, such as 16GiB; other experts stay in RAM.",
            rich_help_panel=_MACHINE,
        ),
    ] = None
    ram: Annotated[
        int | None,
        typer.Option(
            parser=byte_count,
            metavar="<size>",
            help="Host memory to use at most; other experts stay in the file.",
            rich_help_panel=_MACHINE,
        ),
    ] = None
    backend: Backend = None
    kv: KV = None

    def context(self, given: int | None) -> int | None:
        """Tokens of a text at most: what is given, or as many as a budget leaves room for.

        None: all that the model has positions for.
        """
        from qmix.planning.plan import CONTEXT

        is_budgeted = self.vram is not None or self.ram is not None
        return CONTEXT if given is None and is_budgeted else given

    def parse(self, max_context: int | None = None, max_batch: int = 1) -> "LoadOptions":
        """The options of a load.

        Raises:
            QmixError: see LoadOptions.
        """
        from qmix import LoadOptions

        return LoadOptions(**vars(self), max_context=max_context, max_batch=max_batch)


@dataclass(frozen=True)
class Sampling(Group):
    """How text is sampled, as written; None leaves it to the checkpoint, or else to the command."""

    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy.", show_default=_STATED, rich_help_panel=_SAMPLING),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Keep the k most likely tokens; 0 keeps all.",
            show_default=_STATED,
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Keep the smallest set with this probability.",
            show_default=_STATED,
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Drop what is less likely than this share.",
            show_default=_STATED,
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1 discourages repetition.", show_default=_STATED, rich_help_panel=_SAMPLING
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the sampler.", show_default="random", rich_help_panel=_SAMPLING),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help=r"End the text here; may be repeated. \n and \t are understood.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None

    def parse(self, max_new_tokens: int | None) -> "GenerationConfig":
        """What was given, checked before a model is loaded.

        Raises:
            UsageError: an option is out of its range.
        """
        from qmix import GenerationConfig

        options = {name: value for name, value in vars(self).items() if name != "stop"}
        options |= {
            "max_new_tokens": max_new_tokens,
            "stop_strings": list(map(unescaped, self.stop or ())) or None,
        }
        if self.temperature is not None:
            options["do_sample"] = self.temperature != 0
        given = {name: value for name, value in options.items() if value is not None}
        return GenerationConfig(**given).attributed(GIVEN)


@dataclass(frozen=True)
class Reuse(Group):
    """What is made of texts that come again, as written."""

    speculate: Annotated[
        Literal["auto", "off"] | None,
        typer.Option(
            help="Draft what the text repeats, where that is faster and changes no token.",
            show_default="auto",
            rich_help_panel=_SAMPLING,
        ),
    ] = None
    prompt_cache: Annotated[
        Path | None,
        typer.Option(
            parser=folder,
            metavar="DIR",
            help="Keep what was computed of prompts in DIR, and go on from there.",
            show_default="nothing is kept",
            rich_help_panel=_MACHINE,
        ),
    ] = None

    def prompts(self, checkpoint: Path) -> "PromptCache | None":
        """The folder of a checkpoint's prompts, if one is given.

        Raises:
            WriteError: it cannot be made, or others can write to it.
        """
        from qmix.generation.prompt_cache import PromptCache, checkpoint_name

        if self.prompt_cache is None:
            return None
        return PromptCache(self.prompt_cache, checkpoint_name(checkpoint))

    def drafting(
        self, config: "GenerationConfig", model: "MixtralForCausalLM"
    ) -> "GenerationConfig":
        """The configuration with drafts, where no token can change for them."""
        from qmix.generation.speculation import MOST_DRAFTED

        if self.speculate == "off" or model.exact_rows() == 1:
            return config
        return config.updated({"prompt_lookup_num_tokens": MOST_DRAFTED}, by="qmix")


# The escapes that llama.cpp understands on its command line, and \u.
_ESCAPE = re.compile(r"""\\(?:x[0-9a-fA-F]{2}|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|[nrt\\'"])""")


def unescaped(text: str) -> str:
    r"""The text with a newline for `\n`, and so on; other backslashes stay."""
    plain = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
    return _ESCAPE.sub(lambda match: plain.get(match[0][1]) or chr(int(match[0][2:], 16)), text)


LOAD = Load()
REUSE = Reuse()
SAMPLING = Sampling()


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters with groups are replaced by the groups' options.

    A parameter's default gives its options' defaults.
    """
    groups = {
        name: parameter.default
        for name, parameter in signature(command).parameters.items()
        if isinstance(parameter.default, Group)
    }

    @wraps(command)
    def flat(**arguments: Any) -> None:
        for name, group in groups.items():
            options = {field.name: arguments.pop(field.name) for field in fields(group)}
            arguments[name] = replace(group, **options)
        command(**arguments)

    parameters = list(_flattened(signature(command).parameters.values(), groups))
    flat.__signature__ = signature(command).replace(  # type: ignore[attr-defined]
        parameters=parameters
    )
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _flattened(parameters: Iterable[Parameter], groups: Mapping[str, Group]) -> Iterator[Parameter]:
    """The parameters, each group's replaced by one for each of its options."""
    for parameter in parameters:
        if parameter.name not in groups:
            yield parameter
            continue
        for field in fields(parameter.default):
            default = getattr(parameter.default, field.name)
            yield parameter.replace(name=field.name, annotation=field.type, default=default)


def shard_bytes(size: str) -> int:
    """The bytes of --shard-size.

    Raises:
        UsageError: not a size, or out of range.
    """
    return parse_size(size, where="--shard-size", least=1 << 16, most=1 << 44)
