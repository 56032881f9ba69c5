"""StaticDecoder: one new token for every row of a batch on a GPU, always by the same launches.

Ids, positions and lengths lie in tensors on the device, and all shapes are static. So nothing is
read back, a few launches a layer serve every token, and all of them can be recorded once as a CUDA
graph. The result is what `Decoder.decode` and the head compute for one new position; choosing the
next id can be part of it.

Knows modules, and of bits only that they lie in the packed layout. Shape letters: see qmix.nn; and
R slots of the cache.
"""

import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.experts.gpu_store import DeviceStore
from qmix.generation import cuda_graph
from qmix.generation.layer_launches import LayerLaunches, StepSettings
from qmix.generation.packed_layers import first_experts, packed_layers
from qmix.generation.token_selector import SampleFn
from qmix.kernels.gpu.current_device import on
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.nn.decoder import Decoder
from qmix.nn.linear import Linear


class StepCache(Protocol):
    """What a step asks of the cache that it writes into."""

    @property
    def batch(self) -> int: ...
    @property
    def length(self) -> int: ...
    def storage(self, layer: int) -> tuple[Tensor, Tensor]: ...


def _settings(config: MixtralConfig) -> tuple[object, ...]:
    """What the launches are made for and a user may change."""
    return (
        config.sliding_window,
        config.num_experts_per_tok,
        config.rope_theta,
        config.max_position_embeddings,
    )


def _recordable(device: torch.device) -> bool:
    return device.type == "cuda"


def _continues(mask: Tensor, before: Tensor) -> bool:
    """Whether a mask is a part of the same memory, from the same place on, as the last one."""
    if mask.is_inference() or before.is_inference():  # nothing says whether these were changed
        return False
    return (mask.data_ptr(), mask.stride(), mask._version) == (
        before.data_ptr(),
        before.stride(),
        before._version,
    )


class RotaryTables:
    """Cosines and sines of all positions, made once for all decoders of a model."""

    def __init__(self) -> None:
        self._made_for: tuple[object, ...] = ()
        self._tables: tuple[Tensor, Tensor] | None = None

    def of(
        self, config: MixtralConfig, positions: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(1, 1, at least `positions`, d) each."""
        made_for = (config.head_dim, config.rope_theta, device, dtype)
        tables = self._tables if made_for == self._made_for else None
        if tables is None or tables[0].shape[2] < positions:
            at = torch.arange(positions, device=device)[None]
            tables = kernels.rotary(at, config.head_dim, config.rope_theta, dtype)
            self._made_for, self._tables = made_for, tables
        return tables


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

    _mask: Tensor | None = None  # that `_padding` was taken from
    _expert_ids: Sequence[Tensor] = ()  # of each layer, in a recording's own memory

    def __init__(
        self,
        model: Decoder,
        head: Linear,
        cache: StepCache,
        *,
        padded: bool = False,
        sample_fn: SampleFn | None = None,
        record: bool = True,
        tuning: StepTuning = UNTUNED,
        rotary: RotaryTables | None = None,
        pool: cuda_graph.Pool | None = None,
    ) -> None:
        """The model must be `supported`.

        Args:
            padded: rows may have padding on the left, see `set_padding`.
            sample_fn: chooses the next id, as part of a step.
            record: replay a step as a CUDA graph; otherwise it is launched operation by operation.
            tuning: how it is launched.
            rotary: tables that other decoders of the model read, too.
            pool: memory that other recordings of the cache use, too.
        """
        layers = packed_layers(model)
        self._experts = first_experts(model)
        store = model.experts_store
        self._store = store if isinstance(store, DeviceStore) else None
        config, self._embedding = model.config, model.embed_tokens
        self._settings = _settings(config)
        self._head, norm = head, model.norm.weight
        self._storage = [cache.storage(layer) for layer in range(len(layers))]
        self.padded, self.sample_fn = padded, sample_fn
        device, dtype = norm.device, norm.dtype
        slots = self._storage[0][0].shape[2]
        self.max_positions = max(config.max_position_embeddings, slots) + 1
        tables = RotaryTables() if rotary is None else rotary
        self._cos, self._sin = tables.of(config, self.max_positions, device, dtype)
        self.ids = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self.past = torch.full((cache.batch,), cache.length, dtype=torch.int32, device=device)
        self._padding = torch.zeros_like(self.past) if padded else None  # columns on the left
        self.logits = torch.zeros(cache.batch, head.out_features, device=device)
        self.scores = torch.zeros_like(self.logits)
        settings = StepSettings(
            heads=config.num_attention_heads,
            top_k=config.num_experts_per_tok,
            eps=config.rms_norm_eps,
            window=config.sliding_window,
            cos=self._cos,
            sin=self._sin,
            past=self.past,
            padding=self._padding,
            last_norm=norm,
        )
        self._through_layers = LayerLaunches(layers, self._storage, settings, tuning)
        shape = (len(layers), cache.batch, config.num_experts_per_tok)
        self._route_log = torch.zeros(shape, dtype=torch.int64, device=device)
        self._pool = pool
        self._record = record and _recordable(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._lengths: tuple[int, ...] | None = (cache.length,) * cache.batch  # None: interrupted

    @property
    def expert_ids(self) -> Tensor:
        """The experts that the last step chose, int64 (layers, B, k)."""
        return torch.stack(tuple(self._expert_ids))

    def is_current(self, model: Decoder, cache: StepCache) -> bool:
        """Whether model and cache still have the tensors that the launches read.

        A cache that grew has others, and so has a model that was moved or got other weights. Only
        the first and the last layer are compared, since this runs once a token; and what the
        launches take from the config, which may be assigned.
        """
        first, last = self._storage[0][0], self._storage[-1][1]
        return (
            cache.storage(0)[0] is first
            and cache.storage(len(self._storage) - 1)[1] is last
            and first_experts(model) is self._experts
            and _settings(model.config) == self._settings
        )

    @torch.no_grad()
    def step(self, ids: Tensor | None = None) -> Tensor:
        """Decode one position: the logits (B, V), which the next step overwrites.

        Args:
            ids: (B,) or (B, 1); None: `self.ids` as they are.
        """
        with on(self.ids.device):
            if self._store is None:
                return self._step(ids)
            return self._store.in_turn(lambda: self._step(ids))

    def _step(self, ids: Tensor | None) -> Tensor:
        lengths, self._lengths = self._lengths, None
        if ids is not None:
            self.ids.copy_(ids.reshape(-1))
        if self._store is not None:
            self._store.on_token_end()
        if self._record and self._graph is None:
            self._graph = self._recorded()
            self._record = self._graph is not None
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()
        if self._store is not None:
            self._store.log(self._route_log)
        self._lengths = None if lengths is None else tuple(length + 1 for length in lengths)
        return self.logits

    def _recorded(self) -> torch.cuda.CUDAGraph | None:
        """The step as a graph; None, with a warning, if it cannot be recorded here."""
        generator = None if self.sample_fn is None else self.sample_fn.generator
        try:
            # The runs before write the keys of the position that the step overwrites.
            return cuda_graph.record(self._launch, (self.ids, self.past), generator, self._pool)
        except cuda_graph.RecordingError as error:
            warnings.warn(
                f"a decode step could not be recorded as a CUDA graph ({error}); it is launched "
                "operation by operation, which is slower",
                stacklevel=2,
            )
            return None

    def seek(self, length: int) -> None:
        """Continue after the first `length` columns of the cache."""
        self.seek_rows((length,) * len(self.ids))

    @torch.no_grad()
    def seek_rows(self, lengths: Sequence[int]) -> None:
        """Continue after the first columns of the cache, so many in each row."""
        if tuple(lengths) != self._lengths:
            self._lengths = None
            self.past.copy_(torch.tensor(lengths, dtype=torch.int32))
            self._lengths = tuple(lengths)

    @torch.no_grad()
    def set_padding(self, attention_mask: Tensor) -> None:
        """Take each row's padding from its mask, bool (B, L): False at columns on the left.

        A mask that has only grown since the last step, within the same memory, is not read again.
        """
        assert self._padding is not None
        if self._mask is None or not _continues(attention_mask, self._mask):
            self._padding.copy_((~attention_mask).sum(1))
        self._mask = attention_mask

    def _launch(self) -> None:
        """Launch a step. Nothing here may depend on a value that lies on the device."""
        # An id of -1 says that the scores were not finite; the host finds it a step later.
        x = self._embedding(self.ids.clamp(0, self._embedding.num_embeddings - 1))
        last, self._expert_ids = self._through_layers(x)
        self.logits.copy_(kernels.linear(last, self._head.stored))
        self.past.add_(1)
        if self._store is not None:
            torch.stack(self._expert_ids, out=self._route_log)
        if self.sample_fn is not None:
            scores, ids = self.sample_fn(self.logits)
            self.scores.copy_(scores)
            self.ids.copy_(ids)
