"""Files <-> weights: strict readers and writers, one file a format."""

from qmix.formats.checkpoint import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
