"""Regular expressions that name some modules of a Mixtral and no others, in few words.

For GPTQ's rules and compressed-tensors' targets. Knows no scheme and no file.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from qmix.formats import names

_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])")


def patterns(named: Collection[str], modules: Collection[str]) -> Iterator[str]:
    """Expressions that match the modules `named`, and no other of `modules`, from their start.

    gptqmodel's names of these modules match too; so do `qkv_proj` and `experts`, by which vLLM asks
    for what it fuses, where all that is fused is named.
    """
    attention: dict[str, set[str]] = {}  # by layer
    experts: dict[str, dict[str, set[str]]] = {}  # by layer and expert
    for module in named:
        if found := _ATTENTION.fullmatch(module):
            attention.setdefault(found[1], set()).add(found[2])
        elif found := _EXPERT.fullmatch(module):
            experts.setdefault(found[1], {}).setdefault(found[2], set()).add(found[3])
        else:
            yield re.escape(module) + "$"
    places = [found for module in modules if (found := _EXPERT.fullmatch(module))]
    every_layer = {found[1] for found in places}
    every_expert = {found[2] for found in places}
    alike: dict[str, list[str]] = {}  # what follows the layer's number -> the layers
    for layer, letters in attention.items():
        alike.setdefault(_attention(letters), []).append(layer)
    for layer, matrices in experts.items():
        for tail in _experts(matrices, every_expert):
            alike.setdefault(tail, []).append(layer)
    for tail, layers in alike.items():
        yield rf"model\.layers\.{_any_of(layers, every_layer)}\.{tail}"


def _attention(letters: Collection[str]) -> str:
    if len(letters) == 4:
        return r"self_attn\..*"
    fused = ["qkv"] if {"q", "k", "v"} <= set(letters) else []
    return rf"self_attn\.({'|'.join([*sorted(letters), *fused])})_proj$"


def _experts(matrices: Mapping[str, set[str]], every_expert: Collection[str]) -> Iterator[str]:
    """Expressions for the matrices of one layer's experts, given by expert."""
    start = r"(block_sparse_moe|mlp)\.experts"
    alike: dict[tuple[str, ...], list[str]] = {}  # matrices -> the experts of which they are
    for expert, chosen in matrices.items():
        alike.setdefault(tuple(sorted(chosen)), []).append(expert)
    for own, of in alike.items():
        if len(own) == 3 and len(of) == len(every_expert):
            yield start + r"(\..*)?$"
            continue
        theirs = [names.spellings(f"experts.0.{matrix}")[1].rpartition(".")[2] for matrix in own]
        yield rf"{start}\.{_any_of(of, every_expert)}\.({'|'.join([*own, *theirs])})$"


def _any_of(numbers: Sequence[str], every: Collection[str]) -> str:
    if len(numbers) == len(every):
        return r"\d+"
    return numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
