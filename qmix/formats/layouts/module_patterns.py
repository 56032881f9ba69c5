"""Regular expressions that match some modules of a Mixtral and no others, in few words.

GPTQ's rules and compressed-tensors' targets are made of them. Knows no scheme and no file.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from qmix.formats import names

_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])")


def expressions(chosen: Collection[str], every: Collection[str]) -> Iterator[str]:
    """Expressions that match the modules `chosen` from their start, and no other module of `every`.

    They also match gptqmodel's names of these modules; and `qkv_proj` and `experts`, by which vLLM
    asks about what it fuses, if all that is fused is chosen.
    """
    attention: dict[str, set[str]] = {}  # layer -> letters
    experts: dict[str, dict[str, set[str]]] = {}  # layer -> expert -> matrices
    for module in chosen:
        if match := _ATTENTION.fullmatch(module):
            attention.setdefault(match[1], set()).add(match[2])
        elif match := _EXPERT.fullmatch(module):
            experts.setdefault(match[1], {}).setdefault(match[2], set()).add(match[3])
        else:
            yield re.escape(module) + "$"
    matches = [match for module in every if (match := _EXPERT.fullmatch(module))]
    all_layers = {match[1] for match in matches}
    all_experts = {match[2] for match in matches}
    layers_by_tail: dict[str, list[str]] = {}  # what follows the layer's number -> the layers
    for layer, letters in attention.items():
        layers_by_tail.setdefault(_attention(letters), []).append(layer)
    for layer, matrices in experts.items():
        for tail in _experts(matrices, all_experts):
            layers_by_tail.setdefault(tail, []).append(layer)
    for tail, layers in layers_by_tail.items():
        yield rf"model\.layers\.{_any_of(layers, all_layers)}\.{tail}"


def _attention(letters: Collection[str]) -> str:
    if len(letters) == 4:
        return r"self_attn\..*"
    fused = ["qkv"] if {"q", "k", "v"} <= set(letters) else []
    return rf"self_attn\.({'|'.join([*sorted(letters), *fused])})_proj$"


def _experts(matrices: Mapping[str, set[str]], all_experts: Collection[str]) -> Iterator[str]:
    """Expressions for the matrices of one layer's experts, given as expert -> matrices."""
    start = r"(block_sparse_moe|mlp)\.experts"
    experts_by_matrices: dict[tuple[str, ...], list[str]] = {}
    for expert, chosen in matrices.items():
        experts_by_matrices.setdefault(tuple(sorted(chosen)), []).append(expert)
    for classic, experts in experts_by_matrices.items():
        if len(classic) == 3 and len(experts) == len(all_experts):
            yield start + r"(\..*)?$"
            continue
        gptqmodel = [names.spellings(f"experts.0.{m}")[1].rpartition(".")[2] for m in classic]
        matrix = "|".join([*classic, *gptqmodel])
        yield rf"{start}\.{_any_of(experts, all_experts)}\.({matrix})$"


def _any_of(numbers: Sequence[str], every: Collection[str]) -> str:
    if len(numbers) == len(every):
        return r"\d+"
    return numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
