"""The directory of the trained tiny model: checkpoint, tokenizer and model card.

Knows nothing of the training loop.
"""

import sys
from pathlib import Path

import torch

from qmix import strict_json
from qmix.evals import corpus, markdown
from qmix.evals.training.plan import TrainingPlan
from qmix.evals.training.train_tokenizer import BOS, EOS
from qmix.evals.training.trainer import HeldoutScore
from qmix.models.causal_lm import MixtralForCausalLM

SHARD_BYTES = 5_000_000  # three shards, so that every reader of the directory meets an index


def save_tiny(model: MixtralForCausalLM, tokenizer_bytes: bytes, card: str, out: Path) -> None:
    """Write a directory in the form of Mixtral-8x7B on the hub.

    It is written beside `out` and renamed at the end.
    """
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True)
    model.bfloat16().save_pretrained(partial, max_shard_bytes=SHARD_BYTES)
    (partial / "tokenizer.model").write_bytes(tokenizer_bytes)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    strict_json.write(
        partial / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS}
    )
    strict_json.write(partial / "special_tokens_map.json", specials)
    strict_json.write(
        partial / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "additional_special_tokens": [],
            **specials,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": model.config.max_position_embeddings,
            "pad_token": None,
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
        },
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(out)


def model_card(
    plan: TrainingPlan, score: HeldoutScore, model: MixtralForCausalLM, time: str
) -> str:
    """The README of the model's directory.

    Args:
        time: how long the training took, in words.
    """
    parameters = sum(p.numel() for p in model.parameters())
    experts = range(model.config.num_local_experts)
    loads = [
        (str(layer), *(f"{100 * load:.1f}" for load in row))
        for layer, row in enumerate(score.expert_loads)
    ]
    return f"""# A tiny Mixtral

{parameters / 1e6:.2f} M parameters ({2 * parameters / 1e6:.1f} MB in bfloat16), trained from scratch on the
text that every Python installation carries: pydoc's topics and the docstrings of the standard library
(Python Software Foundation License). It exists so that every change to qmix can be measured on a
mixture of experts that has really been trained. It writes like a docstring, knows little, and should
not be asked for facts.

{_facts(plan, score, time)}
Optimizer: AdamW, peak rate {plan.peak_rate:g}, {plan.warmup_steps} steps of warm-up, cosine, weight
decay {plan.weight_decay:g}, gradients clipped to norm {plan.clip_norm:g}, auxiliary loss with
coefficient {model.config.router_aux_loss_coef:g}. {100 * plan.chat_share:.0f} % of the tokens are questions
and answers made from the same docstrings, in Mixtral's `[INST]` format.

The text differs between Python versions, and with it every figure above. Which documents are held out
does not differ, because their names decide.

Share of each layer's routes (in percent, 2 routes a token, held-out text; 12.5 is even):

{markdown.table(("layer", *map(str, experts)), loads)}"""


def _facts(plan: TrainingPlan, score: HeldoutScore, time: str) -> str:
    training, heldout = corpus.training_text(), corpus.heldout_text()
    command = "python -m qmix.evals.training.train_tiny OUT"
    protocol = (
        f"one BOS, windows of {plan.window} side by side, tail dropped; weights rounded to bfloat16, "
        "arithmetic in float32"
    )
    rows = (
        (
            "held-out perplexity",
            f"**{score.perplexity:.3f}** (loss {score.loss:.4f} nats a token, {score.tokens} tokens)",
        ),
        ("protocol", protocol),
        (
            "tokens seen",
            f"{plan.steps * plan.batch * plan.window:,} "
            f"({plan.steps} steps of {plan.batch} x {plan.window})",
        ),
        ("seed", str(plan.seed)),
        ("command", f"`{command} --steps {plan.steps} --seed {plan.seed}`"),
        ("Python, torch", f"{sys.version.split()[0]}, {torch.__version__}"),
        ("time", f"{time}, evaluation included"),
        ("training text", _fingerprint(training)),
        ("held-out text", _fingerprint(heldout)),
    )
    return markdown.table(("", ""), rows)


def _fingerprint(text: str) -> str:
    return f"{len(text.encode()):,} bytes, sha256 `{corpus.fingerprint(text)}`"
