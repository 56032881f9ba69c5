"""Files <-> weights: strict readers and writers of checkpoints, one layout a file.

Knows nothing of modules. Importing this package, and what reads only headers (metadata,
files.shard_index, layouts.tensor_names), imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qmix.formats.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from qmix.formats import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'qmix.formats' has no attribute {name!r}")
