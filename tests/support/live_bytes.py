"""The memory of tensors that live at the same time, on any device, as an allocator counts it."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make within the block, until their last tensor is gone.

    Memory that an operation uses inside itself is not seen.

    Attributes:
        now: bytes that live. peak: the most that lived at the same time.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._tensors = {}  # of each storage: its bytes, and how many of its tensors live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._see(leaf, known)
        return result

    def _see(self, tensor, known):
        key = _key(tensor)
        if key not in self._tensors:
            if key in known:
                return  # a view of what was there before
            self._tensors[key] = [tensor.untyped_storage().nbytes(), 0]
            self.now += self._tensors[key][0]
            self.peak = max(self.peak, self.now)
        self._tensors[key][1] += 1
        weakref.finalize(tensor, self._gone, key)

    def _gone(self, key):
        entry = self._tensors[key]
        entry[1] -= 1
        if not entry[1]:
            self.now -= entry[0]
            del self._tensors[key]


def _key(tensor):
    return tensor.untyped_storage()._cdata
