"""What a checkpoint's generation_config.json states, as far as qmix has it.

Knows no values' ranges; those are GenerationConfig's.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmix import strict_json

# Fields that generation_config.json may state. The others are a caller's business.
_STATED = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("no_repeat_ngram_size", "bad_words_ids", "max_new_tokens", "max_length", "min_new_tokens"),
    *("stop_strings", "eos_token_id", "pad_token_id", "bos_token_id"),
)
# Entries of transformers that would change the text, each with the value that changes nothing.
_NOT_HERE: Mapping[str, object] = {
    "num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None,
    "encoder_repetition_penalty": 1.0, "min_length": 0, "guidance_scale": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "watermarking_config": None,
    "penalty_alpha": None, "exponential_decay_length_penalty": None, "max_time": None,
}  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The fields that the file states, by name.

    Entries that qmix does not know are named in a warning if they would change the text.

    Raises:
        CheckpointError: the file is damaged.
    """
    document = strict_json.read(path)
    stated = {name: document[name] for name in _STATED if document.get(name) is not None}
    if document.get("top_k", 0) is None:
        stated["top_k"] = None
    unknown = [name for name, neutral in _NOT_HERE.items() if _changes(document, name, neutral)]
    if unknown:
        warnings.warn(
            f"{path}: {', '.join(unknown)}: qmix does not have this, and generates without it",
            stacklevel=6,
        )
    return stated


def _changes(document: Mapping[str, Any], name: str, neutral: object) -> bool:
    return document.get(name) not in (None, neutral, [], {})
