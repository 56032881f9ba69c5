"""qmix: Mixtral-8x7B in 4 bits on one GPU.

Importing this package imports no torch: the public names below are resolved on first use.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmix import errors as errors
    from qmix.config import MixtralConfig as MixtralConfig
    from qmix.generation.config import GenerationConfig as GenerationConfig
    from qmix.generation.sampling import Sampling as Sampling
    from qmix.generation.streamers import TextIteratorStreamer as TextIteratorStreamer
    from qmix.generation.streamers import TextStreamer as TextStreamer
    from qmix.models.auto import AutoConfig as AutoConfig
    from qmix.models.auto import AutoModelForCausalLM as AutoModelForCausalLM
    from qmix.models.auto import AutoTokenizer as AutoTokenizer
    from qmix.models.auto import load as load
    from qmix.models.causal_lm import MixtralForCausalLM as MixtralForCausalLM
    from qmix.models.classifier import (
        MixtralForSequenceClassification as MixtralForSequenceClassification,
    )
    from qmix.models.mixtral import MixtralModel as MixtralModel
    from qmix.models.options import LoadOptions as LoadOptions
    from qmix.models.quantization import BitsAndBytesConfig as BitsAndBytesConfig
    from qmix.nn.cache import KVCache as KVCache
    from qmix.nn.outputs import GenerateDecoderOnlyOutput as GenerateDecoderOnlyOutput
    from qmix.nn.outputs import ModelOutput as ModelOutput
    from qmix.nn.outputs import MoeCausalLMOutputWithPast as MoeCausalLMOutputWithPast
    from qmix.nn.outputs import MoeModelOutputWithPast as MoeModelOutputWithPast
    from qmix.nn.outputs import SequenceClassifierOutputWithPast as SequenceClassifierOutputWithPast
    from qmix.text.chat_template import Message as Message
    from qmix.text.tokenizer import LlamaTokenizer as LlamaTokenizer

__version__ = "0.1.0"

# In a checkout quantize/, evals/ and cli.py lie beside this package; the wheel nests them in it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

# Where each public name is defined. The imports above say the same to a type checker.
_MODULES = {
    "AutoConfig": "qmix.models.auto",
    "AutoModelForCausalLM": "qmix.models.auto",
    "AutoTokenizer": "qmix.models.auto",
    "BitsAndBytesConfig": "qmix.models.quantization",
    "GenerateDecoderOnlyOutput": "qmix.nn.outputs",
    "GenerationConfig": "qmix.generation.config",
    "KVCache": "qmix.nn.cache",
    "LlamaTokenizer": "qmix.text.tokenizer",
    "LoadOptions": "qmix.models.options",
    "Message": "qmix.text.chat_template",
    "MixtralConfig": "qmix.config",
    "MixtralForCausalLM": "qmix.models.causal_lm",
    "MixtralForSequenceClassification": "qmix.models.classifier",
    "MixtralModel": "qmix.models.mixtral",
    "ModelOutput": "qmix.nn.outputs",
    "MoeCausalLMOutputWithPast": "qmix.nn.outputs",
    "MoeModelOutputWithPast": "qmix.nn.outputs",
    "Sampling": "qmix.generation.sampling",
    "SequenceClassifierOutputWithPast": "qmix.nn.outputs",
    "TextIteratorStreamer": "qmix.generation.streamers",
    "TextStreamer": "qmix.generation.streamers",
    "load": "qmix.models.auto",
}

__all__ = [*_MODULES, "errors"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name == "errors":
        return import_module("qmix.errors")
    raise AttributeError(f"module 'qmix' has no attribute {name!r}")


def __dir__() -> list[str]:
    dunders = [name for name in globals() if name.startswith("__") and name.endswith("__")]
    return [*__all__, *dunders]
