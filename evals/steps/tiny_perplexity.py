"""The trained tiny model on the device and on the CPU: perplexity of the same ids, and logits.

The ids are what the model itself writes, so no tokenizer is needed. What the CPU computes is
compared with both paths of the device: a prompt as a whole, and step by step.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.evals.steps.setting import ChosenTunings, Setting
from qmix.evals.training import tiny_model
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.quantization import BitsAndBytesConfig

TOKENS = 1000
# What a token's share of the logarithm may differ by, in nats, where roundings to bfloat16 are all
# that differs: four standard deviations. They average out over the tokens; a wrong kernel does not.
_ROUNDING = 0.5


def results(setting: Setting) -> Iterator[dict[str, object]]:
    """One result for the CPU, then one for each path of the device."""
    setting.release()
    host, tested = _loaded(torch.device("cpu")), _loaded(setting.device)
    count = min(TOKENS, 4 * setting.widths.most_tokens)
    torch.manual_seed(0)
    prompt = torch.tensor([[1]])
    ids = host.generate(prompt, max_new_tokens=count, do_sample=True, eos_token_id=None)
    assert isinstance(ids, Tensor)
    expected = host(ids).logits[0].float()
    perplexity = _perplexity(expected, ids)
    yield {"path": "CPU", "ids": ids.shape[1], "perplexity": perplexity}
    on_device = ids.to(setting.device)
    paths: dict[str, Callable[[], Tensor]] = {
        "prompt": lambda: tested(on_device).logits[0],
        "steps": lambda: _steps(tested, on_device),
    }
    for name, path in paths.items():
        logits = path().float().cpu()
        found = _perplexity(logits, ids)
        result: dict[str, object] = {
            "path": f"{setting.device.type}, {name}",
            "perplexity": found,
            "ratio": found / perplexity,
            "largest_difference": float((logits - expected).abs().max()),
            "same_top_1": float((logits.argmax(-1) == expected.argmax(-1)).float().mean()),
        }
        if not abs(math.log(found / perplexity)) < _ROUNDING / math.sqrt(ids.shape[1]):
            result["failed"] = f"perplexity {found:.4f} where the CPU has {perplexity:.4f}"
        yield result


def _loaded(device: torch.device) -> MixtralForCausalLM:
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model = MixtralForCausalLM.from_pretrained(
        tiny_model.directory(), device=device, quantization_config=quantization
    )
    model.static_decoders.tuner = ChosenTunings()  # a search for so small a model says nothing
    return model


def _steps(model: MixtralForCausalLM, ids: Tensor) -> Tensor:
    """The logits after each id [S, V], one step at a time."""
    cache = model.new_cache(1, ids.shape[1])
    rows = [model.next_logits(ids[:, i : i + 1], cache, None, None) for i in range(ids.shape[1])]
    return torch.cat([row.clone() for row in rows])


def _perplexity(logits: Tensor, ids: Tensor) -> float:
    return float(F.cross_entropy(logits[:-1], ids[0, 1:]).exp())
