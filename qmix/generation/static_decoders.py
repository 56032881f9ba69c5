"""StaticDecoders: a model's StaticDecoders, one for each cache that it writes into.

Knows when a step with static shapes can be taken, and nothing of its launches.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qmix import kernels
from qmix.experts.gpu_store import DeviceStore
from qmix.generation import cuda_graph
from qmix.generation.packed_layers import is_plain, supported
from qmix.generation.static_decoder import RotaryTables, StaticDecoder, StepCache
from qmix.generation.token_selector import SampleFn
from qmix.generation.tuner import StepTuner, Tuner
from qmix.kernels.gpu.current_device import on
from qmix.nn.cache import KVCache
from qmix.nn.cache_slab import CacheSlab, SlabRow
from qmix.nn.decoder import Decoder
from qmix.nn.linear import Linear


def _on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


class _OfCache:
    """What the steps of one cache share.

    Two decoders for a batch, one that samples and one that does not: a prompt of one column needs
    the logits alone, and so does a choice that depends on the whole context.
    """

    def __init__(self) -> None:
        self.decoders: dict[tuple[int, bool], StaticDecoder] = {}
        self.generator: torch.Generator | None = None
        self._pool: cuda_graph.Pool | None = None

    def pool(self, device: torch.device) -> cuda_graph.Pool | None:
        """One pool for all: they never run at the same time."""
        if self._pool is None and device.type == "cuda":
            with on(device):
                self._pool = torch.cuda.graph_pool_handle()
        return self._pool


class StaticDecoders:
    """A model's StaticDecoders for each cache that it writes into, as long as the cache lives.

    Attributes:
        tuner: says how their steps are launched.
    """

    def __init__(self) -> None:
        self._by_cache: WeakKeyDictionary[KVCache | CacheSlab, _OfCache] = WeakKeyDictionary()
        self._rotary = RotaryTables()
        self.tuner: StepTuner = Tuner()

    def generator(self, cache: KVCache, device: torch.device, seed: int) -> torch.Generator:
        """The cache's own generator, seeded anew.

        It stays the same one, so that a recorded step which draws from it stays valid.
        """
        shared = self._by_cache.setdefault(cache, _OfCache())
        if shared.generator is None or shared.generator.device != device:
            shared.generator = torch.Generator(device)
        return shared.generator.manual_seed(seed)

    def for_cache(
        self,
        model: Decoder,
        head: Linear,
        cache: KVCache,
        attention_mask: Tensor | None,
        sample_fn: SampleFn | None = None,
    ) -> StaticDecoder | None:
        """A decoder for the cache's next position; None where model or cache do not allow it.

        Args:
            attention_mask: bool (B, L or L + 1), False at padding on the left.
            sample_fn: makes a step choose the next id, too; another function needs another decoder.
        """
        if not _is_possible(model, head):
            return None
        cache.reserve(cache.length + 1)
        shared, padded = self._by_cache.setdefault(cache, _OfCache()), attention_mask is not None
        decoder = self._current(model, head, cache, shared, padded=padded, sample_fn=sample_fn)
        if decoder is None or cache.length >= decoder.max_positions:
            return None
        if attention_mask is not None:
            decoder.set_padding(attention_mask)
        decoder.seek(cache.length)
        return decoder

    def for_rows(
        self, model: Decoder, head: Linear, rows: Sequence[SlabRow]
    ) -> StaticDecoder | None:
        """A decoder for the next position of rows of one slab; None where model or rows forbid it.

        There is one for each number of rows. The rows may change places: its ids and logits are in
        the order of these.
        """
        if not _is_possible(model, head):
            return None
        slab = rows[0].slab
        front, shared = slab.front(rows), self._by_cache.setdefault(slab, _OfCache())
        decoder = self._current(model, head, front, shared, padded=False, sample_fn=None)
        if decoder is None or front.length >= decoder.max_positions:
            return None
        decoder.seek_rows([row.length for row in front.rows])
        return decoder

    def _current(
        self,
        model: Decoder,
        head: Linear,
        cache: StepCache,
        shared: _OfCache,
        *,
        padded: bool,
        sample_fn: SampleFn | None,
    ) -> StaticDecoder | None:
        """The decoder of a cache, or a new one where what it was made for has changed."""
        key = cache.batch, sample_fn is not None
        decoder = shared.decoders.get(key)
        if (
            decoder is None
            or (decoder.padded, decoder.sample_fn) != (padded, sample_fn)
            or not decoder.is_current(model, cache)
        ):
            if not supported(model):
                return None
            with torch.inference_mode(False):  # else no step outside of it could write its tensors
                decoder = StaticDecoder(
                    model,
                    head,
                    cache,
                    padded=padded,
                    sample_fn=sample_fn,
                    tuning=self.tuner.of(model, head, cache.batch),
                    rotary=self._rotary,
                    pool=shared.pool(cache.storage(0)[0].device),
                )
            shared.decoders[key] = decoder
        return decoder

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of a model has caches of its own."""
        return StaticDecoders, ()


def _is_possible(model: Decoder, head: Linear) -> bool:
    """Whether static shapes can do what the model is to do now."""
    if not _on_gpu(next(model.parameters())) or torch.is_grad_enabled():
        return False
    if kernels.overridden() or model.attn_implementation == "eager":
        return False
    store = model.experts_store
    return is_plain(head, Linear) and not (isinstance(store, DeviceStore) and not store.recordable)
