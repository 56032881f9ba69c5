"""Decoding with half of the experts in slots and the others in pinned host memory.

The same steps run twice, with all experts resident and then offloaded: the logits must be equal
bits. Knows models, and of the store what it counts.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from qmix.evals.steps.setting import Setting
from qmix.evals.timing import bandwidth, bench
from qmix.experts.gpu_store import DeviceStore
from qmix.experts.policy import Policy
from qmix.experts.reader import ExpertReader
from qmix.generation.static_decoder import StaticDecoder
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.device_offload import DeviceOffload
from qmix.models.offload import Tiers, blocks_of

LAYERS = 8
TOKENS, DEPTH = 48, 512


class _AllOnHost:
    """In place of a reader of files: a number of experts, none of which is ever read."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


def results(setting: Setting, weights: str = "nf4") -> Iterator[dict[str, object]]:
    """One result resident, one offloaded, one that compares the logits."""
    setting.release()
    model = setting.packed_model(weights, LAYERS)
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    found = []
    for name in ("resident", "half resident"):
        if name != "resident":
            store = offloaded(model, setting.device, layers * experts // 2)
        logits, seconds = _decoded(model, setting)
        found.append(logits)
        result: dict[str, object] = {
            "experts": name,
            "layers": layers,
            "tokens_per_second": len(logits) / seconds,
        }
        if name != "resident":
            did = store.statistics()
            result |= {**did.to_dict(), "hit_rate": did.hit_rate}
        yield result
    equal = torch.equal(*found)
    yield {
        "experts": "logits of both",
        "equal_bits": equal,
        **({} if equal else {"failed": "differ"}),
    }


def offloaded(model: MixtralForCausalLM, device: torch.device, slots: int) -> DeviceStore:
    """Move a packed model's experts to host memory, with `slots` of them on the device too."""
    blocks = blocks_of(dict(model.named_modules()))
    count = len(blocks) * model.config.num_local_experts
    packed = [block.stored.packed for block in blocks]
    sizes = [len(each.blob) for layer in packed if layer is not None for each in layer.packed]
    reader = cast(ExpertReader, _AllOnHost(count))
    offloading = DeviceOffload(
        reader, len(blocks), sizes, Tiers(device=slots, host=count), Policy(count), device
    )
    for block in blocks:
        offloading.take(block)
    return offloading.finish(blocks)


def _decoded(model: MixtralForCausalLM, setting: Setting) -> tuple[Tensor, float]:
    """The logits of some steps [steps, V], and the seconds of the second of two rounds."""
    tokens, depth = (min(each, setting.widths.most_tokens) for each in (TOKENS, DEPTH))
    torch.manual_seed(0)
    cache = model.new_cache(1, depth + tokens)
    bench.fill_cache(cache, depth)
    decoder = StaticDecoder(model.model, model.lm_head, cache, record=setting.device.type == "cuda")
    ids = torch.arange(3, 3 + tokens, device=setting.device)
    logits = torch.empty(tokens, model.config.vocab_size, device=setting.device)

    def round_() -> None:
        decoder.seek(depth)
        for index in range(tokens):
            logits[index] = decoder.step(ids[index])[0]

    round_()
    return logits, bandwidth.seconds(round_, setting.device)
