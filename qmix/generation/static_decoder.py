"""StaticDecoder: one new token for every row of a batch on a GPU, always by the same launches.

Ids, positions and lengths lie in tensors on the device, and all shapes are static. So nothing is
read back, nine launches a layer serve every token, and all of them can be recorded once as a CUDA
graph. The result is what `Decoder.decode` and the head compute for one new position; choosing the
next id can be part of it.

Knows modules, and of bits only that they lie in the packed layout. Shape letters: see qmix.nn; and
R slots of the cache.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.experts.gpu_store import DeviceStore
from qmix.experts.layer_experts import Experts
from qmix.generation import cuda_graph
from qmix.generation.token_selector import SampleFn
from qmix.kernels import PackedExperts, PackedWeight
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.nn.cache import KVCache
from qmix.nn.cpu_decode import why_not_modules
from qmix.nn.decoder import Decoder
from qmix.nn.decoder_layer import DecoderLayer
from qmix.nn.linear import Linear, RMSNorm, is_observed
from qmix.nn.moe import SparseMoeBlock
from qmix.weights.dense import Dense
from qmix.weights.packed.layout import PackedMatrix

_UNKNOWN = -1  # the length of a decoder whose step was interrupted


@dataclass(frozen=True, eq=False)
class _LayerWeights:
    """What the kernels of one layer read."""

    input_norm: Tensor
    qkv: PackedMatrix
    o_proj: PackedMatrix
    post_norm: Tensor
    gate: Tensor
    experts: PackedExperts


def _layer_weights(layer: nn.Module) -> _LayerWeights | None:
    """The layer's weights; None if one is not packed, or the layer's modules have to be called."""
    if type(layer) is not DecoderLayer or is_observed(layer) or why_not_modules(layer):
        return None
    attention, block = layer.self_attn, layer.block_sparse_moe
    qkv, o_proj = _whole_matrix(attention.fused_qkv), _whole_matrix(attention.o_proj.stored)
    gate, experts = block.gate.stored, block.stored.packed
    if qkv is None or o_proj is None or experts is None or not isinstance(gate, Dense):
        return None
    return _LayerWeights(
        layer.input_layernorm.weight,
        qkv,
        o_proj,
        layer.post_attention_layernorm.weight,
        gate.data,
        experts,
    )


def _whole_matrix(weight: object) -> PackedMatrix | None:
    """The matrix of a packed weight; None if the weight is a part of one, or not packed."""
    if isinstance(weight, PackedWeight) and weight.selection is None:
        return weight.matrix
    return None


def _first_experts(model: Decoder) -> Experts | None:
    """The first layer's experts, None without such a block; where these lie, the others lie too."""
    block = getattr(model.layers[0], "block_sparse_moe", None)
    return block.stored if isinstance(block, SparseMoeBlock) else None


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module need not be called: its weight says all that it computes."""
    return type(module) is kind and not is_observed(module)


def supported(model: Decoder) -> bool:
    """Whether the kernels take the decoder: its dtype, its heads, and packed weights throughout.

    The launches call no module, so one with a hook, or of another class, is not supported.
    """
    return (
        _is_plain(model.norm, RMSNorm)
        and model.norm.weight.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and model.config.head_dim in (16, 32, 64, 128)
        and all(_layer_weights(layer) is not None for layer in model.layers)
    )


def _settings(config: MixtralConfig) -> tuple[object, ...]:
    """What the launches are made for and a user may change."""
    return (
        config.sliding_window,
        config.num_experts_per_tok,
        config.rope_theta,
        config.max_position_embeddings,
    )


class StaticDecoder:
    """Decodes one new position per row after those in a cache, by the same launches each time.

    Between steps the caller may change `ids`; advancing the cache's length is left to the caller.

    Attributes:
        ids: int64 (B,), the ids that the next step reads. With `sample_fn` a step replaces them by
            those that it chose.
        past: int32 (B,), columns before the next step's; a step adds one.
        logits, scores: float32 (B, V), of the last step, before and after `sample_fn`'s processors.
        max_positions: how many columns there may be.
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
        tuning: StepTuning = UNTUNED,
    ) -> None:
        """The model must be `supported`.

        Args:
            padded: rows may have padding on the left, see `set_padding`.
            sample_fn: chooses the next id, as part of a step.
            record: replay a step as a CUDA graph; otherwise it is launched operation by operation.
            tuning: which launches are one.
        """
        layers = [_layer_weights(layer) for layer in model.layers]
        self._layers = [layer for layer in layers if layer is not None]
        assert len(self._layers) == len(layers)
        self._experts = _first_experts(model)
        store = model.experts_store
        self._store = store if isinstance(store, DeviceStore) else None
        config, self._embedding = model.config, model.embed_tokens
        self._settings = _settings(config)
        self._head, self._norm, self._window = head, model.norm.weight, config.sliding_window
        self._num_heads, self._top_k = config.num_attention_heads, config.num_experts_per_tok
        self._eps = config.rms_norm_eps
        self._storage = [cache.storage(layer) for layer in range(len(layers))]
        self.padded, self.sample_fn = padded, sample_fn
        device, dtype = self._norm.device, self._norm.dtype
        slots = self._storage[0][0].shape[2]
        self.max_positions = max(config.max_position_embeddings, slots) + 1
        positions = torch.arange(self.max_positions, device=device)[None]
        self._cos, self._sin = kernels.rotary(positions, config.head_dim, config.rope_theta, dtype)
        self.ids = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self.past = torch.full((cache.batch,), cache.length, dtype=torch.int32, device=device)
        self._padding = torch.zeros_like(self.past) if padded else None  # columns on the left
        self._no_partials = torch.zeros(cache.batch, config.hidden_size, device=device)
        self.logits = torch.zeros(cache.batch, head.out_features, device=device)
        self.scores = torch.zeros_like(self.logits)
        heads = cache.batch * config.num_key_value_heads
        self._split_arrivals = (
            torch.zeros(heads, dtype=torch.int32, device=device) if tuning.merge_in_split else None
        )
        shape = (len(layers), cache.batch, self._top_k)
        self._route_log = torch.zeros(shape, dtype=torch.int64, device=device)
        self._record = record and device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._length = cache.length

    def is_current(self, model: Decoder, cache: KVCache) -> bool:
        """Whether model and cache still have the tensors that the launches read.

        A cache that grew has others, and so has a model that was moved or got other weights. Only
        the first and the last layer are compared, since this runs once a token; and what the
        launches take from the config, which may be assigned.
        """
        first, last = self._storage[0][0], self._storage[-1][1]
        return (
            cache.storage(0)[0] is first
            and cache.storage(len(self._storage) - 1)[1] is last
            and _first_experts(model) is self._experts
            and _settings(model.config) == self._settings
        )

    @torch.no_grad()
    def step(self, ids: Tensor | None = None) -> Tensor:
        """Decode one position: the logits (B, V), which the next step overwrites.

        Args:
            ids: (B,) or (B, 1); None: `self.ids` as they are.
        """
        if self._store is None:
            return self._step(ids)
        return self._store.in_turn(lambda: self._step(ids))

    def _step(self, ids: Tensor | None) -> Tensor:
        length, self._length = self._length, _UNKNOWN
        if ids is not None:
            self.ids.copy_(ids.reshape(-1))
        if self._store is not None:
            self._store.on_token_end()
        if not self._record:
            self._launch()
        else:
            if self._graph is None:
                generator = None if self.sample_fn is None else self.sample_fn.generator
                # The runs before write the keys of the position that the step overwrites.
                self._graph = cuda_graph.record(self._launch, (self.ids, self.past), generator)
            self._graph.replay()
        if self._store is not None:
            self._store.log(self._route_log)
        self._length = length + 1
        return self.logits

    @torch.no_grad()
    def seek(self, length: int) -> None:
        """Continue after the first `length` columns of the cache."""
        if length != self._length:
            self._length = _UNKNOWN
            self.past.fill_(length)
            self._length = length

    @torch.no_grad()
    def set_padding(self, attention_mask: Tensor) -> None:
        """Take each row's padding from its mask, bool (B, L): False at columns on the left."""
        assert self._padding is not None
        self._padding.copy_((~attention_mask).sum(1))

    def _launch(self) -> None:
        """Launch a step. Nothing here may depend on a value that lies on the device."""
        from qmix.kernels.gpu import attention, pointwise
        from qmix.kernels.gpu import moe as gpu_moe

        half, batch = torch.float16, len(self.ids)
        x = self._embedding(self.ids)
        partials = self._no_partials
        expert_ids = []
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
                heads=self._num_heads,
                starts=self._padding,
                dtype=keys.dtype,
            )
            attended = attention.attend_cached(
                q,
                keys,
                values,
                self.past,
                starts=self._padding,
                window=self._window,
                dtype=half,
                arrivals=self._split_arrivals,
            )
            router = pointwise.residual_norm_route(
                x,
                gpu_moe.linear_partials(attended.view(batch, -1), layer.o_proj),
                layer.post_norm,
                self._eps,
                layer.gate,
                self._top_k,
                dtype=half,
            )
            x = router.total
            expert_ids.append(router.routes.ids)
            partials = gpu_moe.expert_partials(router.normed, router.routes, layer.experts.table, 0)
        _, last = pointwise.residual_norm(x, partials, self._norm, self._eps)
        self.logits.copy_(kernels.linear(last, self._head.stored))
        self.past.add_(1)
        if self._store is not None:
            torch.stack(expert_ids, out=self._route_log)
        if self.sample_fn is not None:
            scores, ids = self.sample_fn(self.logits)
            self.scores.copy_(scores)
            self.ids.copy_(ids)


def _on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


class StaticDecoders:
    """A model's StaticDecoders for each cache that it writes into, as long as the cache lives.

    Two for a cache, one that samples and one that does not: a prompt of one column needs the logits
    alone, and so does a choice that depends on the whole context.
    """

    def __init__(self) -> None:
        self._by_cache: WeakKeyDictionary[KVCache, dict[bool, StaticDecoder]] = WeakKeyDictionary()

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
        if not _on_gpu(next(model.parameters())) or torch.is_grad_enabled():
            return None
        if kernels.overridden() or model.attn_implementation == "eager":
            return None
        if not _is_plain(head, Linear):
            return None
        store = model.experts_store
        if isinstance(store, DeviceStore) and not store.recordable:
            return None
        cache.reserve(cache.length + 1)
        decoders, samples = self._by_cache.setdefault(cache, {}), sample_fn is not None
        decoder, padded = decoders.get(samples), attention_mask is not None
        if (
            decoder is None
            or (decoder.padded, decoder.sample_fn) != (padded, sample_fn)
            or not decoder.is_current(model, cache)
        ):
            if not supported(model):
                return None
            decoder = StaticDecoder(model, head, cache, padded=padded, sample_fn=sample_fn)
            decoders[samples] = decoder
        if cache.length >= decoder.max_positions:
            return None
        if attention_mask is not None:
            decoder.set_padding(attention_mask)
        decoder.seek(cache.length)
        return decoder

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of a model has caches of its own."""
        return StaticDecoders, ()
