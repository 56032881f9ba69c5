"""qmix: Mixtral-8x7B in 4 bits on one GPU.

Importing this package imports no torch: the public names below are resolved on first use.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmix.config import MixtralConfig
    from qmix.generation.config import GenerationConfig
    from qmix.generation.streamers import TextIteratorStreamer, TextStreamer
    from qmix.models.auto import AutoModelForCausalLM, AutoTokenizer, load
    from qmix.models.causal_lm import (
        MixtralForCausalLM,
        MixtralForSequenceClassification,
        MixtralModel,
    )
    from qmix.text.tokenizer import LlamaTokenizer

__version__ = "0.1.0"

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "GenerationConfig",
    "LlamaTokenizer",
    "MixtralConfig",
    "MixtralForCausalLM",
    "MixtralForSequenceClassification",
    "MixtralModel",
    "TextIteratorStreamer",
    "TextStreamer",
    "load",
]

# In a checkout quantize/, evals/ and cli.py lie beside this package; the wheel nests them inside it.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

_HOMES = {
    "AutoModelForCausalLM": "qmix.models.auto",
    "AutoTokenizer": "qmix.models.auto",
    "GenerationConfig": "qmix.generation.config",
    "LlamaTokenizer": "qmix.text.tokenizer",
    "MixtralConfig": "qmix.config",
    "MixtralForCausalLM": "qmix.models.causal_lm",
    "MixtralForSequenceClassification": "qmix.models.causal_lm",
    "MixtralModel": "qmix.models.causal_lm",
    "TextIteratorStreamer": "qmix.generation.streamers",
    "TextStreamer": "qmix.generation.streamers",
    "load": "qmix.models.auto",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qmix' has no attribute {name!r}")
