"""Records which experts a model's tokens go through, as a trace.

Runs the ids through the decoder in chunks and reads the router's logits, which every pass leaves behind:
generation itself carries no hook. Shape letters: T tokens, E experts, k chosen experts a token.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qmix import kernels
from qmix.errors import UsageError
from qmix.evals.routing.trace import Header, Recorder
from qmix.evals.timing import traffic
from qmix.experts.policy import ONE
from qmix.generation.config import GenerationConfig
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.decoder_layer import DecoderLayer
from qmix.planning.budget import PREFILL_CHUNK
from qmix.text.tokenizer import LlamaTokenizer

Progress = Callable[[int, int], None]


def header(model: MixtralForCausalLM, *, name: str, gates: bool) -> Header:
    """What a trace of this model says of it; sizes as the weights are stored."""
    layer = model.model.layers[0]
    assert isinstance(layer, DecoderLayer)
    expert = layer.block_sparse_moe.stored[0]
    return Header(
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
    recorder: Recorder,
    *,
    tokens: int,
    progress: Progress = lambda done, total: None,
) -> int:
    """The first `tokens` tokens of a text, each as if it had been decoded; returns how many there were.

    A text longer than the model's positions goes on in a new window that sees nothing of the old one.
    """
    taken = 8 * tokens  # characters: a gigabyte need not be encoded for a thousand tokens
    ids = tokenizer.encode(text[:taken])
    while len(ids) < tokens and taken < len(text):
        taken *= 2
        ids = tokenizer.encode(text[:taken])
    ids = ids[:tokens]
    limit = model.config.max_position_embeddings
    for start in range(0, len(ids), limit):
        window = torch.tensor([ids[start : start + limit]])
        _record(model, window, 0, recorder)
        progress(min(start + limit, len(ids)), len(ids))
    return len(ids)


def record_generation(
    model: MixtralForCausalLM,
    tokenizer: LlamaTokenizer,
    prompt: str,
    recorder: Recorder,
    *,
    max_new_tokens: int,
) -> int:
    """The tokens that greedy decoding feeds back after a prompt; returns how many there were.

    They are decoded first and run through once more in chunks. Where two experts are as good as equal,
    a chunk may choose the other one.

    Raises:
        UsageError: prompt and new tokens do not fit the model's positions, or the model ends at once.
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
        max_new_tokens=max_new_tokens, eos_token_id=model.generation_config.eos_token_id
    )
    whole = model.generate(ids, generation_config=greedy)
    assert isinstance(whole, Tensor)
    fed = whole[:, :-1]  # the last one goes through no expert
    if fed.shape[1] == first:
        raise UsageError(
            "nothing was decoded after the first token",
            remedy="Another prompt, or more --max-new-tokens.",
        )
    _record(model, fed.cpu(), first, recorder)
    return int(fed.shape[1]) - first


@torch.no_grad()
def _record(model: MixtralForCausalLM, ids: Tensor, first: int, recorder: Recorder) -> None:
    """Write the routes of ids (1, T) from position `first` on, one window of one cache."""
    cache = model.new_cache(1, ids.shape[1])
    for start in range(0, ids.shape[1], PREFILL_CHUNK):
        piece = ids[:, start : start + PREFILL_CHUNK].to(model.device)
        logits = model.model.decode(model.model.embed(piece), cache=cache).router_logits
        routes = [kernels.route(layer, model.config.num_experts_per_tok) for layer in logits]
        chosen = torch.stack([layer.ids for layer in routes], 1).tolist()  # T x layers x k
        weights = torch.stack([layer.weights for layer in routes], 1)
        gates = (weights * ONE).round().long().tolist()
        for at in range(max(first - start, 0), piece.shape[1]):
            recorder.token(chosen[at], gates[at] if recorder.header.gates else ())


def record(
    model: MixtralForCausalLM,
    tokenizer: LlamaTokenizer,
    out: Path,
    *,
    name: str,
    max_new_tokens: int,
    prompt: str | None = None,
    text: str | None = None,
    gates: bool = False,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write a trace of a text, or of what follows a prompt; returns the number of tokens.

    A file that could not be completed is removed.

    Raises:
        UsageError: both or neither of them, or a file that exists. CheckpointError: it cannot be written.
    """
    if (prompt is None) == (text is None):
        raise UsageError("give a PROMPT or --data, and not both")
    if max_new_tokens < 1:
        raise UsageError(
            "out of range", where="--max-new-tokens", expected="1 or more", found=max_new_tokens
        )
    with Recorder(out, header(model, name=name, gates=gates)) as recorder:
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
