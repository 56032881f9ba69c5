"""The files of a checkpoint directory: their names on the hub, and how large one may be.

Knows no torch and nothing of what the files hold.
"""

from qmix.hub import selection

INDEX = selection.INDEX
SINGLE = selection.SINGLE
# Largest output file unless the user says otherwise: under the hub's 5 GB.
SHARD_BYTES = 4_900_000_000


def shard_name(index: int, count: int) -> str:
    """The hub's file name of shard `index`, counted from 0, of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
