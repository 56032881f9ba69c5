"""Every tensor name that a Mixtral checkpoint may use, and the exact set that a model needs.

The canonical names are the classic ones of the hub's Mixtral-8x7B:
`model.layers.L.block_sparse_moe.experts.E.w1.weight`. Knows nothing of files or bits.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qmix.config import MixtralConfig

TensorKind = Literal["embedding", "norm", "attention", "router", "expert", "head"]

# Other spellings, replaced in this order (gptqmodel 7 and transformers 5 name the block `mlp`).
_SPELLINGS = (
    (re.compile(r"^(embed_tokens|layers|norm)\."), r"model.\1."),
    (re.compile(r"\.mlp\.(gate|experts)\."), r".block_sparse_moe.\1."),
    # Matrices of stacked experts, as qmix.formats.stacked names them.
    (re.compile(r"\.experts\.gate_up_proj\[(\d+)\]\.gate$"), r".experts.\1.w1.weight"),
    (re.compile(r"\.experts\.gate_up_proj\[(\d+)\]\.up$"), r".experts.\1.w3.weight"),
    (re.compile(r"\.experts\.down_proj\[(\d+)\]$"), r".experts.\1.w2.weight"),
    (re.compile(r"\.switch_mlp\.(\w+_proj)\[(\d+)\]\."), r".experts.\2.\1."),
    (re.compile(r"(\.block_sparse_moe\.experts\.\d+)\.gate_proj\."), r"\1.w1."),
    (re.compile(r"(\.block_sparse_moe\.experts\.\d+)\.up_proj\."), r"\1.w3."),
    (re.compile(r"(\.block_sparse_moe\.experts\.\d+)\.down_proj\."), r"\1.w2."),
)

_GPTQMODEL = {
    ".block_sparse_moe.": ".mlp.",
    ".w1": ".gate_proj",
    ".w3": ".up_proj",
    ".w2": ".down_proj",
}

# Scales of a rounded KV cache, as ModelOpt, llm-compressor and AutoFP8 name them.
_CACHE_SCALE = re.compile(
    r"model\.layers\.(\d{1,6})\.self_attn\.(?:[kv]_proj\.output|[kv]_proj\.[kv]|attn\.[kqv]|[kqv]|kv)_scale"
)

# Buffers that old versions saved, although they follow from the config.
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class ModelTensor:
    """One weight that a model needs: canonical name (which ends in `.weight`), shape and kind."""

    name: str
    shape: tuple[int, ...]
    kind: TensorKind
    layer: int | None = None

    @property
    def prefix(self) -> str:
        """The module's name: the tensor's without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def linear(self) -> bool:
        """Whether it is the matrix of a linear layer, and so may be packed."""
        return self.kind in ("attention", "router", "expert", "head")


@dataclass(frozen=True)
class Place:
    """Where a weight belongs: its layer, its expert, and the last part of its module's name."""

    layer: int | None
    expert: int | None
    part: str


_PLACE = re.compile(
    r"(?:model\.layers\.(\d+)\.)?(?:block_sparse_moe\.experts\.(\d+)\.)?(?:\w+\.)*?(\w+)(?:\.weight)?"
)


def place(name: str) -> Place:
    """Where a weight of this canonical name belongs; `.weight` may be missing."""
    match = _PLACE.fullmatch(name)
    assert match is not None, name
    layer, expert = (None if digits is None else int(digits) for digits in match.groups()[:2])
    return Place(layer, expert, match[3])


def canonical(name: str) -> str:
    """The canonical spelling of a tensor name; an unknown name is returned unchanged."""
    for pattern, spelling in _SPELLINGS:
        name = pattern.sub(spelling, name)
    return name


def spellings(module: str) -> tuple[str, str]:
    """A module's classic name, as given, and its name in gptqmodel 7."""
    other = module
    for classic, gptqmodel in _GPTQMODEL.items():
        other = other.replace(classic, gptqmodel)
    return module, other


def ignored(name: str) -> bool:
    """Whether a tensor holds nothing that the config does not say already."""
    return _IGNORED.fullmatch(name) is not None


def of_cache(name: str, config: MixtralConfig) -> bool:
    """Whether a tensor is a scale by which a layer's KV cache would be rounded; qmix's is not."""
    match = _CACHE_SCALE.fullmatch(name)
    return match is not None and int(match[1]) < config.num_hidden_layers


def model_tensors(config: MixtralConfig) -> Iterator[ModelTensor]:
    """Every weight of a model, in order; the config's architectures decide on the head."""
    hidden = config.hidden_size
    yield ModelTensor("model.embed_tokens.weight", (config.vocab_size, hidden), "embedding")
    for layer in range(config.num_hidden_layers):
        yield from layer_tensors(config, layer)
    yield ModelTensor("model.norm.weight", (hidden,), "norm")
    yield from _head(config)


def _head(config: MixtralConfig) -> Iterator[ModelTensor]:
    """The head, unless it is the embedding, or the files are those of a model without a head."""
    listed = config.extra.get("architectures")
    architectures = listed if isinstance(listed, list) else []
    if "MixtralForSequenceClassification" in architectures:
        yield ModelTensor("score.weight", (config.num_labels, config.hidden_size), "head")
    elif "MixtralModel" not in architectures and not config.tie_word_embeddings:
        yield ModelTensor("lm_head.weight", (config.vocab_size, config.hidden_size), "head")


def count(config: MixtralConfig) -> int:
    """How many weights `model_tensors` yields, without making their names."""
    per_layer = 4 + 2 + 1 + 3 * config.num_local_experts
    return 2 + config.num_hidden_layers * per_layer + len(list(_head(config)))


def layer_tensors(config: MixtralConfig, layer: int) -> Iterator[ModelTensor]:
    """The weights of one decoder layer."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    base = f"model.layers.{layer}"
    yield ModelTensor(f"{base}.input_layernorm.weight", (hidden,), "norm", layer)
    for name, shape in (
        ("q_proj", (query, hidden)),
        ("k_proj", (key_value, hidden)),
        ("v_proj", (key_value, hidden)),
        ("o_proj", (hidden, query)),
    ):
        yield ModelTensor(f"{base}.self_attn.{name}.weight", shape, "attention", layer)
    yield ModelTensor(f"{base}.post_attention_layernorm.weight", (hidden,), "norm", layer)
    moe = f"{base}.block_sparse_moe"
    experts = config.num_local_experts
    yield ModelTensor(f"{moe}.gate.weight", (experts, hidden), "router", layer)
    for expert in range(experts):
        for name, shape in (
            ("w1", (intermediate, hidden)),
            ("w2", (hidden, intermediate)),
            ("w3", (intermediate, hidden)),
        ):
            yield ModelTensor(f"{moe}.experts.{expert}.{name}.weight", shape, "expert", layer)
