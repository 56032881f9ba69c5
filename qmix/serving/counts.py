"""Counts: what a scheduler has done, in numbers. Knows nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What has happened since the start; `running` and `waiting` are of the moment.

    Attributes:
        cached_tokens: of prompts, that a slot or the folder held; restored_tokens: the folder.
        drafted_tokens, accepted_tokens: see DraftCounts.
        stored_prompts, refused_prompts: texts that were written into the folder, or could not be.
    """

    running: int = 0
    waiting: int = 0
    requests: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0
    new_tokens: int = 0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    stored_prompts: int = 0
    refused_prompts: int = 0
