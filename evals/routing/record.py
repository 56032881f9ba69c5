"""Records which experts a model's tokens go through, as a trace.

Runs the ids through the decoder in chunks and reads the router's logits, which every pass returns.
Generation itself has no hook for it. Shape letters: T tokens, k experts per token. Knows nothing of
policies.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qmix import kernels
from qmix.errors import UsageError
from qmix.evals.routing.trace import TraceHeader, TraceRecorder
from qmix.evals.timing import traffic
from qmix.experts.policy import ONE
from qmix.generation.config import GenerationConfig
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.decoder_layer import DecoderLayer
from qmix.planning.budget import PREFILL_CHUNK
from qmix.text.tokenizer import LlamaTokenizer


def trace_header(model: MixtralForCausalLM, *, name: str, gates: bool) -> TraceHeader:
    """The header of a trace of this model, with the sizes of its stored weights."""
    layer = model.model.layers[0]
    assert isinstance(layer, DecoderLayer)
    expert = layer.block_sparse_moe.stored[0]
    return TraceHeader(
        layers=model.config.num_hidden_layers,
        experts=model.config.num_local_experts,
        chosen=model.config.num_experts_per_tok,
        model=name,
        gates=gates,
        expert_bytes=sum(part.nbytes for part in (expert.w1, expert.w2, expert.w3)),
        dense_bytes=traffic.shared_bytes(model, 1),
    )


def record_text(
    model: MixtralForCausalLM,
    tokenizer: LlamaTokenizer,
    text: str,
    recorder: TraceRecorder,
    *,
    tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Record the first `tokens` tokens of a text as if they were decoded; returns their number.

    A text longer than the model's positions continues in a new window, which sees nothing of the
    old.
    """
    length = 8 * tokens  # characters: a thousand tokens do not need a gigabyte encoded
    ids = tokenizer.encode(text[:length])
    while len(ids) < tokens and length < len(text):
        length *= 2
        ids = tokenizer.encode(text[:length])
    ids = ids[:tokens]
    limit = model.config.max_position_embeddings
    for start in range(0, len(ids), limit):
        window = torch.tensor([ids[start : start + limit]])
        _record_routes(model, window, 0, recorder)
        progress(min(start + limit, len(ids)), len(ids))
    return len(ids)


def record_generation(
    model: MixtralForCausalLM,
    tokenizer: LlamaTokenizer,
    prompt: str,
    recorder: TraceRecorder,
    *,
    max_new_tokens: int,
) -> int:
    """Record the tokens that greedy decoding feeds back after a prompt; returns their number.

    They are first decoded, then run through the model once more in chunks. Where the scores of two
    experts are nearly equal, a chunk may choose the other one.

    Raises:
        UsageError: prompt and new tokens exceed the model's positions, or the model ends at once.
    """
    ids = torch.tensor([tokenizer.encode(prompt)])
    first, limit = ids.shape[1], model.config.max_position_embeddings
    if first + max_new_tokens > limit:
        raise UsageError(
            "prompt and new tokens do not fit the model's positions",
            expected=f"at most {limit}",
            found=f"{first} + {max_new_tokens}",
        )
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
    )
    generated = model.generate(ids, generation_config=greedy)
    assert isinstance(generated, Tensor)
    fed = generated[:, :-1]  # the last token goes through no expert
    if fed.shape[1] == first:
        raise UsageError(
            "nothing was decoded after the first token",
            remedy="Give another prompt, or more --max-new-tokens.",
        )
    _record_routes(model, fed.cpu(), first, recorder)
    return int(fed.shape[1]) - first


@torch.no_grad()
def _record_routes(
    model: MixtralForCausalLM, ids: Tensor, first: int, recorder: TraceRecorder
) -> None:
    """Record the routes of ids (1, T) from position `first` on, all in one cache."""
    cache = model.new_cache(1, ids.shape[1])
    for start in range(0, ids.shape[1], PREFILL_CHUNK):
        chunk = ids[:, start : start + PREFILL_CHUNK].to(model.device)
        logits = model.model.decode(model.model.embed(chunk), cache=cache).router_logits
        routes = [kernels.route(layer, model.config.num_experts_per_tok) for layer in logits]
        chosen = torch.stack([layer.ids for layer in routes], 1).tolist()  # T x layers x k
        weights = torch.stack([layer.weights for layer in routes], 1)
        gates = (weights * ONE).round().long().tolist()
        for index in range(max(first - start, 0), chunk.shape[1]):
            recorder.token(chosen[index], gates[index] if recorder.header.gates else ())


def record_trace(
    model: MixtralForCausalLM,
    tokenizer: LlamaTokenizer,
    out: Path,
    *,
    name: str,
    max_new_tokens: int,
    prompt: str | None = None,
    text: str | None = None,
    gates: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a trace of a text, or of what follows a prompt; returns the number of tokens.

    A file that cannot be completed is removed.

    Raises:
        UsageError: both or neither of text and prompt are given, or the file exists.
        CheckpointError: the file cannot be written.
    """
    if (prompt is None) == (text is None):
        raise UsageError("give a PROMPT or --data, and not both")
    if max_new_tokens < 1:
        raise UsageError(
            "out of range", where="--max-new-tokens", expected="1 or more", found=max_new_tokens
        )
    with TraceRecorder(out, trace_header(model, name=name, gates=gates)) as recorder:
        try:
            if text is not None:
                return record_text(
                    model, tokenizer, text, recorder, tokens=max_new_tokens, progress=progress
                )
            assert prompt is not None
            return record_generation(
                model, tokenizer, prompt, recorder, max_new_tokens=max_new_tokens
            )
        except BaseException:
            out.unlink(missing_ok=True)
            raise
