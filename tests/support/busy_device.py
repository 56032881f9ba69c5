"""A device that still runs its last step whenever the host does something, without a device.

A model's steps run at once, on the CPU. But what they return counts as running until a HostCopy of
it has been waited for, and whatever else brings a value to the host, or from it, fails meanwhile.
"""

import torch
from torch import Tensor
from torch.nn import functional

from qmix.generation import host_copy, loop, rows, token_selector
from qmix.generation.padding import position_ids
from qmix.generation.token_selector import SampledStep

_TO_THE_HOST = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__index__", "__float__"}


class OnDevice(Tensor):
    """A tensor of the device; a function of it and of a host's tensor is a copy that waits."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        values = [*args, *(kwargs or {}).values()]
        values += [part for value in values if isinstance(value, (list, tuple)) for part in value]
        mixed = any(type(value) is Tensor and value.dim() for value in values)
        if BusyDevice.running and (mixed or function.__name__ in _TO_THE_HOST):
            raise AssertionError(f"{function.__name__} waits for the step that runs")
        return super().__torch_function__(function, types, args, kwargs or {})


class BusyDevice:
    """Puts a model's decode steps onto such a device.

    Attributes:
        enqueued: how many steps have been.
        most_ahead: how many more than had been waited for, at most.

    Args:
        longest: the cache's length at which no step fits any more.
        context_may_wait: the ids so far may be brought to the device while a step runs.
    """

    running = 0

    def __init__(self, model, monkeypatch, longest=None, *, context_may_wait=False):
        self.enqueued = self.most_ahead = self._ended = 0
        self._model, self._longest = model, longest
        device = self

        class Copy(host_copy.HostCopy):
            def __init__(self, source):
                self._values = source.as_subclass(Tensor).clone()
                self._step = device.enqueued

            def wait(self):
                device._ended = max(device._ended, self._step)
                BusyDevice.running = device.enqueued - device._ended
                return self._values

        self._copy = Copy
        monkeypatch.setattr(BusyDevice, "running", 0)
        monkeypatch.setattr(token_selector, "HostCopy", Copy)
        for module in (loop, rows):
            monkeypatch.setattr(module, "to_device", lambda values, _: values.as_subclass(OnDevice))
        monkeypatch.setattr(model, "sample_next", self._sample_next)
        if not context_may_wait:
            monkeypatch.setattr(rows.Rows, "__init__", _on_device(rows.Rows.__init__))

    @torch.no_grad()
    def _sample_next(self, ids, cache, attention_mask, sample_fn):
        if self._longest is not None and cache.length >= self._longest:
            return None
        self.enqueued += 1
        BusyDevice.running = self.enqueued - self._ended
        self.most_ahead = max(self.most_ahead, BusyDevice.running)
        column, mask = ids.as_subclass(Tensor)[:, None], attention_mask
        if mask is not None:  # it may lack the new column
            mask = functional.pad(mask, (0, cache.length + 1 - mask.shape[1]), value=True)
        logits = self._model.next_logits(column, cache, mask, position_ids(mask, 1))
        cache.length -= 1  # stored, and not counted
        scores, chosen = sample_fn(logits)
        ids_ = chosen.as_subclass(OnDevice)
        return SampledStep(logits, scores, ids_, self._copy(ids_))


def _on_device(init):
    """A Rows whose ids so far lie on the device."""

    def made(self, inputs, device):
        init(self, inputs, device)
        self._input_ids = self._input_ids.as_subclass(OnDevice)

    return made
