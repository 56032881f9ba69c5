"""One token for every row of a batch, with static shapes: nine launches a layer, nothing read back.

Positions, ids and the lengths of rows lie in tensors on the device, so that the same launches serve
every token and can be recorded once as a CUDA graph. Means what `Decoder.decode` and the head mean for
one new position; the choice of the next id can be part of it.

Shape letters: B rows, D hidden width, H heads, G key-value heads, d head width, R slots, E experts,
V vocabulary. Knows modules; of bits only that they lie in the packed layout.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmix import kernels
from qmix.experts.gpu_store import DeviceStore
from qmix.generation.token_selector import SampleFn
from qmix.kernels import PackedExperts, PackedWeight
from qmix.nn.attention import Attention
from qmix.nn.cache import KVCache
from qmix.nn.decoder import Decoder
from qmix.nn.decoder_layer import DecoderLayer
from qmix.nn.linear import Linear
from qmix.nn.moe import SparseMoeBlock
from qmix.weights.dense import Dense
from qmix.weights.packed.layout import PackedMatrix

_WARM_UP = 3  # Triton compiles, torch plans; neither may happen while a graph is recorded


@dataclass(frozen=True, eq=False)
class _Layer:
    """What the kernels of one layer read, found once."""

    input_norm: Tensor
    qkv: PackedMatrix
    o_proj: PackedMatrix
    post_norm: Tensor
    gate: Tensor
    experts: PackedExperts


def _matrix(weight: object) -> PackedMatrix | None:
    whole = isinstance(weight, PackedWeight) and weight.selection is None
    return weight.matrix if whole and isinstance(weight, PackedWeight) else None


def _layer(layer: nn.Module) -> _Layer | None:
    """The layer's tensors, or None if a weight is not in the packed layout."""
    assert isinstance(layer, DecoderLayer)
    attention, block = layer.self_attn, layer.block_sparse_moe
    assert isinstance(attention, Attention)
    assert isinstance(block, SparseMoeBlock)
    qkv, o_proj = _matrix(attention.fused_qkv), _matrix(attention.o_proj.stored)
    gate, experts = block.gate.stored, block.stored.packed
    if qkv is None or o_proj is None or not isinstance(gate, Dense):
        return None
    if experts is None:
        return None
    return _Layer(
        layer.input_layernorm.weight,
        qkv,
        o_proj,
        layer.post_attention_layernorm.weight,
        gate.data,
        experts,
    )


def _block(model: Decoder) -> SparseMoeBlock:
    """The first layer's experts, which stand for all."""
    block = model.layers[0].block_sparse_moe
    assert isinstance(block, SparseMoeBlock)
    return block


def supported(model: Decoder) -> bool:
    """Whether every weight of the decoder lies where the nine launches look for it."""
    dtype, width = model.embed_tokens.weight.dtype, model.config.head_dim
    return (
        dtype in (torch.float16, torch.bfloat16, torch.float32)
        and width in (16, 32, 64, 128)
        and all(_layer(layer) is not None for layer in model.layers)
    )


class DecodeStep:
    """Steps of one new position a row over a cache, every one the same launches.

    Between steps the caller may change `ids`; the cache's length is the caller's to advance.

    Attributes:
        ids: int64 [B], what the next step reads. If `sample_fn` is given the step replaces it.
        past: int32 [B], columns before it; a step counts one on.
        logits, scores: float32 (B, V), of the last step, before and after its processors.
        positions: how many there may be.

    Args:
        padded: rows may have padding on the left, see `pad`.
        sample_fn: chooses the next id, as part of the step.
        record: make a CUDA graph of the step; otherwise it is launched operation by operation.
    """

    def __init__(
        self,
        model: Decoder,
        head: Linear,
        cache: KVCache,
        *,
        padded: bool = False,
        sample_fn: SampleFn | None = None,
        record: bool = True,
    ) -> None:
        layers = [_layer(layer) for layer in model.layers]
        self._layers = [layer for layer in layers if layer is not None]
        assert len(self._layers) == len(layers)
        first = _block(model)
        self._stored = first.stored
        self._store = first.offloaded if isinstance(first.offloaded, DeviceStore) else None
        config, self._embedding = model.config, model.embed_tokens.weight
        self._head, self._norm, self._window = head, model.norm.weight, config.sliding_window
        self._heads, self._choices = config.num_attention_heads, config.num_experts_per_tok
        self._eps, self._hidden = config.rms_norm_eps, config.hidden_size
        self._storage = [cache.storage(layer) for layer in range(len(layers))]
        self.padded, self.sample_fn = padded, sample_fn
        device, dtype = self._embedding.device, self._embedding.dtype
        slots = self._storage[0][0].shape[2]
        self.positions = positions = max(config.max_position_embeddings, slots) + 1
        self._cos, self._sin = kernels.rotary(
            torch.arange(positions, device=device)[None], config.head_dim, config.rope_theta, dtype
        )
        self.ids = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self.past = torch.full((cache.batch,), cache.length, dtype=torch.int32, device=device)
        self._starts = torch.zeros_like(self.past) if padded else None
        self._nothing = torch.zeros(cache.batch, self._hidden, device=device)
        self.logits = torch.zeros(cache.batch, head.out_features, device=device)
        self.scores = torch.zeros_like(self.logits)
        shape = (len(layers), cache.batch, self._choices)
        self._route_log = torch.zeros(shape, dtype=torch.int64, device=device)
        self._record = record and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._length = cache.length

    def fits(self, model: Decoder, cache: KVCache) -> bool:
        """Whether model and cache are as they were: a cache that grows, and a model that is moved or
        filled anew, have other tensors. The outer layers stand for all: this is asked every token.
        """
        first, last = self._storage[0][0], self._storage[-1][1]
        return (
            cache.storage(0)[0] is first
            and cache.storage(len(self._storage) - 1)[1] is last
            and _block(model).stored is self._stored
        )

    @torch.no_grad()
    def step(self, ids: Tensor | None = None) -> Tensor:
        """One position on: the logits (B, V), which the next step overwrites.

        Args:
            ids: [B] or [B, 1]; None reads `self.ids` as they are.
        """
        if ids is not None:
            self.ids.copy_(ids.reshape(-1))
        if self._store is not None:
            self._store.on_token_end()
        if not self._record:
            self._launch()
        else:
            if self._graph is None:
                self._graph = self._recorded()
            self._graph.replay()
        if self._store is not None:
            self._store.log(self._route_log)
        self._length += 1
        return self.logits

    @torch.no_grad()
    def move(self, length: int) -> None:
        """Go on after the first `length` columns of the cache."""
        if length != self._length:
            self.past.fill_(length)
            self._length = length

    @torch.no_grad()
    def pad(self, attention_mask: Tensor) -> None:
        """Take each row's padding from attention_mask, bool (B, L): False at the columns on the left."""
        assert self._starts is not None
        self._starts.copy_((~attention_mask).sum(1))

    def _launch(self) -> None:
        """The step itself. Nothing here may depend on a value that lies on the device."""
        from qmix.kernels.gpu import attention, pointwise
        from qmix.kernels.gpu import moe as gpu_moe

        half, batch = torch.float16, len(self.ids)
        x = F.embedding(self.ids, self._embedding)
        partials = self._nothing
        chosen = []
        for layer, (keys, values) in zip(self._layers, self._storage, strict=True):
            x, normed = pointwise.residual_norm(
                x, partials, layer.input_norm, self._eps, dtype=half
            )
            q = pointwise.rotate_store(
                gpu_moe.linear_partials(normed, layer.qkv),
                keys,
                values,
                self._cos,
                self._sin,
                self.past,
                heads=self._heads,
                starts=self._starts,
                dtype=keys.dtype,
            )
            seen = attention.attend_cached(
                q, keys, values, self.past, starts=self._starts, window=self._window, dtype=half
            )
            router = pointwise.residual_norm_route(
                x,
                gpu_moe.linear_partials(seen.view(batch, -1), layer.o_proj),
                layer.post_norm,
                self._eps,
                layer.gate,
                self._choices,
                dtype=half,
            )
            x = router.total
            chosen.append(router.routes.ids)
            partials = gpu_moe.expert_partials(router.normed, router.routes, layer.experts.table, 0)
        _, last = pointwise.residual_norm(x, partials, self._norm, self._eps)
        self.logits.copy_(kernels.linear(last, self._head.stored))
        self.past.add_(1)
        if self._store is not None:
            torch.stack(chosen, out=self._route_log)
        if self.sample_fn is not None:
            scores, ids = self.sample_fn(self.logits)
            self.scores.copy_(scores)
            self.ids.copy_(ids)

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """Record the step. The runs before it count for nothing: what they changed is put back.

        They write the keys of the same position, which the step itself overwrites.
        """
        ids, past = self.ids.clone(), self.past.clone()
        generator = None if self.sample_fn is None else self.sample_fn.generator
        state = None if generator is None else generator.get_state()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._launch()
                self.ids.copy_(ids)
                self.past.copy_(past)
        torch.cuda.current_stream().wait_stream(stream)
        if generator is not None and state is not None:
            generator.set_state(state)
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            self._launch()
        return graph


def _on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


class DecodeSteps:
    """The DecodeSteps of each cache that a model writes into, as long as the cache lives.

    One that chooses and one that does not: a prompt of one column, or a choice that needs the whole
    context, asks for logits alone.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[KVCache, dict[bool, DecodeStep]] = WeakKeyDictionary()

    def for_cache(
        self,
        model: Decoder,
        head: Linear,
        cache: KVCache,
        attention_mask: Tensor | None,
        sample_fn: SampleFn | None = None,
    ) -> DecodeStep | None:
        """Ready for the cache's next position; None where the model or the cache is not fit for it.

        Args:
            attention_mask: bool (B, L or L + 1), False at padding on the left.
            sample_fn: makes the step choose the next id; another function needs another step.
        """
        if not _on_gpu(model.embed_tokens.weight) or torch.is_grad_enabled():
            return None
        if kernels.overridden() or model.attn_implementation == "eager":
            return None
        store = _block(model).offloaded
        if isinstance(store, DeviceStore) and not store.recordable:
            return None
        cache.reserve(cache.length + 1)
        own = self._of.setdefault(cache, {})
        found = own.get(sample_fn is None)
        padded = attention_mask is not None
        fits = found is not None and (found.padded, found.sample_fn) == (padded, sample_fn)
        if found is None or not fits or not found.fits(model, cache):
            if not supported(model):
                return None
            found = DecodeStep(model, head, cache, padded=padded, sample_fn=sample_fn)
            own[sample_fn is None] = found
        if cache.length >= found.positions:
            return None
        if attention_mask is not None:
            found.pad(attention_mask)
        found.move(cache.length)
        return found

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of a model has caches of its own."""
        return DecodeSteps, ()
