"""The entry points load, and the Auto classes. Knows only which class to call."""

from pathlib import Path
from typing import Any

import torch

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UsageError
from qmix.formats.metadata import read_metadata
from qmix.formats.mistral.detect import refuse_raw
from qmix.gguf.files import checked_source, is_gguf
from qmix.hub.remote import HubOptions
from qmix.hub.source import resolve
from qmix.models import arguments
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.text.tokenizer import LlamaTokenizer


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> tuple[MixtralForCausalLM, LlamaTokenizer]:
    """Load a checkpoint directory's model and tokenizer, ready to generate.

    Args:
        dtype, device, options: as in MixtralForCausalLM.from_pretrained, which also takes vram=,
            ram= and load_options=.

    Raises:
        CheckpointError: a file is missing, damaged or not this model's.
        UnsupportedError: a layout that qmix does not read.
        ResourceError: the model does not fit.
    """
    directory = checked_source(resolve(directory, options=HubOptions.taken(options)))
    refuse_raw(directory)
    tokenizer = LlamaTokenizer.from_pretrained(directory)
    model = MixtralForCausalLM.from_pretrained(directory, dtype=dtype, device=device, **options)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            "the tokenizer has more tokens than the model",
            where=str(directory),
            expected=f"at most {model.config.vocab_size}",
            found=tokenizer.vocab_size,
            remedy="The tokenizer belongs to another model.",
        )
    model.tokenizer = tokenizer
    stated = (*model.generation_config.eos_ids, *model.config.eos_token_ids)
    ends = {*stated, tokenizer.eos_token_id} - {None}
    model.generation_config = model.generation_config.updated({"eos_token_id": sorted(ends)})
    return model, tokenizer


class AutoModelForCausalLM:
    """Hugging Face's entry point; there is one architecture to choose."""

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> MixtralForCausalLM:
        """See MixtralForCausalLM.from_pretrained."""
        return MixtralForCausalLM.from_pretrained(directory, **options)

    @classmethod
    def from_config(cls, config: MixtralConfig, **options: Any) -> MixtralForCausalLM:
        """A model with new weights.

        Args:
            options: torch_dtype or dtype, and attn_implementation.
        """
        attention = options.pop("attn_implementation", None)
        unknown = options.keys() - {"torch_dtype", "dtype", "trust_remote_code"}
        if unknown:
            raise UsageError(f"from_config has no option {min(unknown)!r}")
        dtype = arguments.agreed_dtype(options.get("torch_dtype"), options.get("dtype"))
        model = MixtralForCausalLM(config)
        if attention is not None:
            model.set_attn_implementation(attention)
        return model if dtype is None else model.to(dtype)


class AutoConfig:
    """Hugging Face's entry point; there is one architecture to choose."""

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> MixtralConfig:
        """The config of a checkpoint directory or a GGUF file.

        Args:
            options: fields of the config to set; and options of transformers that cannot change
                anything here, as in MixtralForCausalLM.from_pretrained.
        """
        path = resolve(directory, need="config", options=HubOptions.taken(options))
        changes = arguments.config_changes(options)
        config = (
            read_metadata(path).config if is_gguf(path) else MixtralConfig.from_pretrained(path)
        )
        return config.replace(**changes) if changes else config


class AutoTokenizer:
    """Hugging Face's entry point; there is one tokenizer to choose."""

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> LlamaTokenizer:
        """See LlamaTokenizer.from_pretrained."""
        return LlamaTokenizer.from_pretrained(directory, **options)
