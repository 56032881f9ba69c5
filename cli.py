"""The command line: parses, draws, sets exit codes. Heavy imports stay inside the commands.

stdout carries data, stderr the interface. Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input or
checkpoint, 4 resources, 5 quality gate failed, 75 interrupted but resumable, 130 Ctrl-C.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from qmix import __version__
from qmix.commands import plan_command, terminal, trace
from qmix.errors import QmixError, UsageError
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.planning.byte_sizes import parse_size

if TYPE_CHECKING:
    from qmix.generation.config import GenerationConfig

app = typer.Typer(
    help="Mixtral-8x7B in 4 bits on one GPU: quantize, chat, evaluate.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input or checkpoint, 4 resources, "
    "5 quality gate failed, 75 interrupted but resumable, 130 Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(trace.app, name="trace")

SHARD_SIZE = f"{SHARD_BYTES / 1e9:g}GB"
Method = Literal["nf4", "gptq", "rtn", "auto"]
Directory = Annotated[Path, typer.Argument(help="Checkpoint directory.", show_default=False)]
Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:1 or cpu.", show_default="the GPU if there is one")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32.", show_default="the checkpoint's"),
]
Vram = Annotated[
    str | None, typer.Option(help="GPU memory to keep to, as 16GiB; experts beyond it stay in RAM.")
]
Ram = Annotated[
    str | None, typer.Option(help="Host memory to keep to; experts beyond it stay in the file.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the smallest set with this probability mass.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the most likely one.")]
Penalty = Annotated[float, typer.Option(help="Above 1 discourages repetition.")]
Seed = Annotated[int | None, typer.Option(help="Of the sampler.", show_default="random")]
Stop = Annotated[list[str] | None, typer.Option(help="End the text here; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (QMIX_DEBUG=1).")] = False,
) -> None:
    if debug:
        os.environ["QMIX_DEBUG"] = "1"
    if version:
        sys.stdout.write(f"qmix {__version__}\n")
        raise typer.Exit


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="16- or 32-bit checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory for the 4-bit one.")],
    method: Annotated[
        Method, typer.Option(help="How to round; auto chooses bits by loss.")
    ] = "nf4",
    attention: Annotated[
        Literal["4bit", "bf16"], typer.Option(help="Bits of the attention's matrices.")
    ] = "4bit",
    double_quant: Annotated[
        bool, typer.Option(help="nf4: scales in 8 bits, 4.13 instead of 4.5.")
    ] = True,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="gptq, rtn: inputs a scale, 32, 64, 128 or -1 (all).", show_default="128"
        ),
    ] = None,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="gptq, rtn: a zero a group; vLLM wants none.")
    ] = False,
    bits: Annotated[
        float | None,
        typer.Option(help="auto: bits per quantized weight, scales included.", show_default="4.25"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="gptq, auto: UTF-8 text of the kind that the model will see.",
            show_default="Python's documentation",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="gptq, auto: windows of the text.")] = 256,
    seqlen: Annotated[
        int | None,
        typer.Option(help="gptq, auto: tokens a window.", show_default="2048, or the model's"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="gptq, auto: go on with an interrupted run.")
    ] = False,
    device: Device = None,
    shard_size: Annotated[str, typer.Option(help="Largest output file: 5GB, 500MB.")] = SHARD_SIZE,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a checkpoint to 4 bits.

    gptq and auto run calibration text through the model, a layer at a time. Ctrl-C ends after the layer
    (exit 75); the same command with --resume goes on.

    Examples: qmix quantize Mixtral-8x7B-Instruct-v0.1 mixtral-nf4 ·
    qmix quantize Mixtral-8x7B-v0.1 mixtral-gptq --method gptq --calibration books.txt
    """
    from qmix.quantize import methods

    request = methods.Request(
        method=method,
        attention=attention == "4bit",
        double_quant=double_quant,
        group_size=group_size,
        asymmetric=asymmetric,
        bits=bits,
        samples=samples,
        seqlen=seqlen,
        device=device,
        shard_bytes=_size(shard_size),
        resume=resume,
        force=force,
    )
    text: str | None = None
    signals: AbstractContextManager[Callable[[], bool]] = nullcontext(lambda: False)
    if request.calibrated:
        text, signals = _calibration_text(calibration), terminal.interruptible()
    with signals as interrupted, terminal.progress() as show:
        report = methods.run(
            source,
            out,
            request,
            text,
            interrupted=interrupted,
            progress=lambda at: show(at.tensor, at.done_bytes, at.total_bytes),
        )
    terminal.draw_report(report, out)
    if as_json:
        sys.stdout.write(json.dumps(report.to_dict()) + "\n")


@app.command()
def convert(
    raw: Annotated[Path, typer.Argument(metavar="RAW", help="Folder of consolidated.* files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory in the hub's layout.")],
    shard_size: Annotated[str, typer.Option(help="Largest output file: 5GB, 500MB.")] = SHARD_SIZE,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
) -> None:
    """Turn Mistral's own checkpoint (consolidated.*, params.json) into the hub's layout, bit for bit.

    Example: qmix convert Mixtral-8x7B-v0.1-raw Mixtral-8x7B-v0.1
    """
    from qmix.commands.checkpoint import convert as conversion

    shard_bytes = _size(shard_size)
    with terminal.progress() as show:
        result = conversion.run(raw, out, shard_bytes=shard_bytes, force=force, progress=show)
    terminal.draw_conversion(result, out)


@app.command()
def export(
    directory: Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory for the other layout.")],
    layout: Annotated[
        Literal["compressed-tensors", "gptq"],
        typer.Option(
            "--format", help="What vLLM, SGLang and transformers read.", show_default=False
        ),
    ],
    shard_size: Annotated[str, typer.Option(help="Largest output file: 5GB, 500MB.")] = SHARD_SIZE,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")] = False,
) -> None:
    """Write Int4 and Int8 weights (GPTQ, AWQ, compressed-tensors) in another layout, without rounding.

    Example: qmix export mixtral-gptq mixtral-ct --format compressed-tensors
    """
    from qmix.commands.checkpoint import export as exporter

    shard_bytes = _size(shard_size)
    with terminal.progress() as show:
        result = exporter.run(
            directory, out, layout, shard_bytes=shard_bytes, force=force, progress=show
        )
    terminal.draw_export(result, out)


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Argument(help="The text to go on with; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in [INST] tags.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    vram: Vram = None,
    ram: Ram = None,
) -> None:
    """Continue a prompt once; the new text goes to stdout.

    Example: qmix generate mixtral-nf4 "My favourite condiment is" --max-new-tokens 50
    """
    import torch

    import qmix
    from qmix.generation.inputs import GenerationInputs
    from qmix.generation.loop import stream
    from qmix.text import chat_template as template
    from qmix.text.printable import printable

    config = _sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop
    )
    text = _stdin() if prompt == "-" else prompt
    model, tokenizer = qmix.load(directory, dtype=dtype, device=device, vram=vram, ram=ram)
    config = config.updated({"eos_token_id": model.generation_config.eos_token_id})
    if chat:
        ids = template.encode([template.Message("user", text)], tokenizer)
    else:
        ids = tokenizer.encode(text)
    _fits(len(ids), max_new_tokens, model.config.max_position_embeddings)
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


@app.command()
def chat(
    directory: Directory,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    ctx: Annotated[
        int | None, typer.Option(help="Context in tokens.", show_default="the model's")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 1024,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.05,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = None,
    device: Device = None,
    vram: Vram = None,
    ram: Ram = None,
) -> None:
    """Talk to a model. From a pipe every line is a message.

    Examples: qmix chat mixtral-nf4 · echo "What is NF4?" | qmix chat mixtral-nf4
    """
    import qmix
    from qmix.commands.repl import Repl, Streams
    from qmix.commands.session import Session

    config = _sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop
    )
    model, tokenizer = qmix.load(
        directory, dtype=dtype, device=device, vram=vram, ram=ram, max_context=ctx
    )
    config = config.updated({"eos_token_id": model.generation_config.eos_token_id})
    session = Session(model, tokenizer, config, system=system, context=ctx)
    _utf8(sys.stdin)
    Repl(session, Streams(sys.stdin, sys.stdout, terminal.console())).run()


@app.command(name="eval")
def evaluate(
    directory: Directory,
    data: Annotated[Path, typer.Option(help="UTF-8 text file to score.", show_default=False)],
    reference: Annotated[
        Path | None, typer.Option(help="Unquantized checkpoint to compare with.")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option(help="Window.", show_default="2048, or the model's positions")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Step between windows.", show_default="the window")
    ] = None,
    max_perplexity: Annotated[
        float | None, typer.Option(help="Exit 5 if the perplexity is higher.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Exit 5 if the mean KL divergence is higher.")
    ] = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Perplexity of a text, and the divergence from a reference model.

    Example: qmix eval mixtral-nf4 --data wiki.test.raw --reference Mixtral-8x7B-v0.1
    """
    from qmix.evals.quality import perplexity

    if max_kl is not None and reference is None:
        raise UsageError("--max-kl needs --reference")
    with terminal.progress() as show:
        result = perplexity.evaluate(
            directory,
            perplexity.read_text(data),
            reference=reference,
            window=ctx,
            stride=stride,
            dtype=dtype,
            device=device,
            progress=lambda done, total: show(f"layer {done} of {total}", done, total),
        )
    if as_json:
        sys.stdout.write(json.dumps(result.to_dict()) + "\n")
    else:
        terminal.draw_perplexity(result)
    result.gate(max_perplexity=max_perplexity, max_kl=max_kl)


@app.command()
def inspect(directory: Directory, as_json: AsJson = False) -> None:
    """What a checkpoint holds, from its headers alone: layouts, bits a weight, sizes.

    Example: qmix inspect mixtral-nf4
    """
    from qmix.commands.checkpoint.inspect import inspect

    inventory = inspect(directory)
    if as_json:
        sys.stdout.write(json.dumps(inventory.to_dict()) + "\n")
        return
    terminal.draw_inventory(inventory)


@app.command()
def verify(directory: Directory) -> None:
    """Check a checkpoint to the last number: hashes, exact tensor set, finite values. Exit 3 if not.

    Example: qmix verify mixtral-nf4
    """
    from qmix.commands.checkpoint.verify import verify

    with terminal.progress() as show:
        verdict = verify(directory, lambda at: show(at.name, at.done, at.total))
    for problem in verdict.problems[1:]:
        terminal.notice(str(problem))
    if verdict.problems:
        raise verdict.problems[0]
    sys.stdout.write(f"ok: {verdict.weights} weights read, {verdict.hashed} files hashed\n")


@app.command()
def bench(
    directory: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint directory; --attention needs none.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p",
            "--n-prompt",
            "--prompts",
            help="Prompt lengths.",
            show_default="512; 512 to 4096 with --attention",
        ),
    ] = None,
    new: Annotated[str, typer.Option("-n", "--n-gen", help="Numbers of new tokens.")] = "128",
    depth: Annotated[
        str, typer.Option("-d", "--n-depth", help="Tokens in the cache before.")
    ] = "0",
    batch: Annotated[str, typer.Option("-b", "--batch", help="Rows at once.")] = "1",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, help="Timed runs of each test.")
    ] = 5,
    attention: Annotated[
        bool, typer.Option("--attention", help="Attention alone, each implementation beside eager.")
    ] = False,
    window: Annotated[
        int, typer.Option(min=1, help="--attention: the sliding window compared with none.")
    ] = 1024,
    plot: Annotated[
        Path | None, typer.Option(help="--attention: draw it to this PNG.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    dtype: Dtype = None,
    device: Device = None,
    vram: Vram = None,
    ram: Ram = None,
) -> None:
    """Tokens a second, beside the bound that memory sets, in llama-bench's grammar.

    Examples: qmix bench mixtral-nf4 -p 512 -n 128 -d 0,4096 -b 1,8 ·
    qmix bench --attention -p 512,4096 --plot attention.png
    """
    from qmix.evals.timing import attention_bench
    from qmix.evals.timing import bench as benchmark

    if attention:
        if (new, depth, batch) != ("128", "0", "1"):
            raise UsageError("--attention takes no -n, -d and -b")
        request = attention_bench.Request.of(directory, prompt, window, dtype, device, plot)
        with terminal.progress() as show:
            compared = attention_bench.run(request, repetitions=repetitions, progress=show)
        sys.stdout.write(json.dumps(compared.to_dict()) + "\n" if as_json else compared.markdown())
        return
    if directory is None or plot is not None:
        raise UsageError("bench needs a DIRECTORY, and --plot needs --attention")
    from qmix import MixtralForCausalLM

    tests = benchmark.tests_of(prompt or "512", new, depth, batch)
    model = MixtralForCausalLM.from_pretrained(
        directory, dtype=dtype, device=device, vram=vram, ram=ram
    )
    with terminal.progress() as show:
        report = benchmark.run(
            model, tests, name=directory.resolve().name, repetitions=repetitions, progress=show
        )
    sys.stdout.write(json.dumps(report.to_dict()) + "\n" if as_json else report.markdown())


app.command()(plan_command.plan)
app.command()(plan_command.doctor)


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Keep the 4-bit checkpoint here.", show_default="a temporary directory"),
    ] = None,
) -> None:
    """All of it on the tiny Mixtral of a checkout: quantize, evaluate, generate. No arguments."""
    from qmix.evals.quality import demo as show

    show.run(out, terminal.console(), terminal.draw_report)


def main() -> NoReturn:
    """Entry point of the `qmix` command."""
    _make_streams_safe()
    try:
        app()
    except QmixError as error:
        _fail(error, error.exit_code)
    except MemoryError as error:
        _fail(error, 4)
    except Exception as error:  # noqa: BLE001 - the last line of defence of a command
        out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
        _fail(error, 4 if out_of_memory else 1)
    sys.exit(0)


def _make_streams_safe() -> None:
    """A closed stream must not lend its number to a file, nor a locale end a reply."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Arguments are UTF-8 whatever the locale; broken bytes become U+FFFD.
    sys.argv = [os.fsencode(argument).decode("utf-8", "replace") for argument in sys.argv]
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that has gone ends us quietly


def _fail(error: BaseException, code: int) -> NoReturn:
    if os.environ.get("QMIX_DEBUG"):
        raise error
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    if not isinstance(error, QmixError):
        first = f"{type(error).__name__}: {first} (--debug shows where)"
    sys.stderr.write(f"qmix: {first}\n")
    sys.exit(code)


def _sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: list[str] | None,
) -> "GenerationConfig":
    """The options of a command, checked before a model is loaded."""
    from qmix.generation.config import GenerationConfig

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


def _calibration_text(path: Path | None) -> str:
    from qmix.evals import corpus
    from qmix.evals.quality import perplexity

    if path is not None:
        return perplexity.read_text(path).content
    terminal.notice("calibrating with Python's documentation; --calibration takes a text of yours")
    return corpus.training_text()


def _fits(prompt: int, new: int, positions: int) -> None:
    if prompt + new > positions:
        raise UsageError(
            "prompt and new tokens do not fit the model's positions",
            expected=f"at most {positions}",
            found=f"{prompt} + {new}",
            remedy="Shorten the prompt or lower --max-new-tokens.",
        )


def _size(text: str) -> int:
    return parse_size(text, where="--shard-size", least=1 << 16, most=1 << 44)


def _stdin() -> str:
    _utf8(sys.stdin)
    return sys.stdin.read()


def _utf8(stream: object) -> None:
    """Input is UTF-8 whatever the locale; broken bytes become U+FFFD, a byte-order mark goes."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="utf-8-sig", errors="replace")


if __name__ == "__main__":
    main()
