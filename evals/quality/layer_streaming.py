"""The final hidden states of many windows, with one layer of the model in memory at a time.

In this way a 93 GB checkpoint is scored beside its 24 GB version on a machine that holds neither.
The layers are the runtime's own. Shape letters: W windows, S window, D hidden width, V vocabulary.
Knows nothing of texts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.formats import Checkpoint
from qmix.kernels.backend import Backend, preferred
from qmix.kernels.choice import choose
from qmix.kv_format import KVFormat, check_width
from qmix.models import load, offload
from qmix.models.options import parse_device
from qmix.nn.attention import ForwardContext
from qmix.nn.decoder_layer import DecoderLayer
from qmix.nn.embedding import embedding
from qmix.nn.linear import Linear, RMSNorm
from qmix.planning import budget
from qmix.planning.plan import check_memory
from qmix.planning.stored_model import StoredModel
from qmix.weights.dense import Dense, Weight

BATCH_TOKENS = 4096  # tokens of a pass, which give each of 8 experts several hundred


def windows_a_pass(size: int) -> int:
    """Windows of `size` tokens that a pass computes; no pass depends on another."""
    return max(1, BATCH_TOKENS // size)


class Scorer:
    """Computes a checkpoint's logits over fixed windows, once `advance` has run every layer.

    Args:
        ids: int64 (W, S).
        dtype: of the computation; None means the checkpoint's.
        backend: whose code multiplies; None: the best that is right on the device.
        kv: what a cache makes of keys and values, which every position sees.

    Raises:
        ResourceError: too little memory for one layer and the windows.
        UnsupportedError: the named backend cannot run.
        UsageError: the heads do not fit `kv`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Tensor,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        backend: Backend | None = None,
        kv: KVFormat = "16",
    ) -> None:
        check_width(kv, checkpoint.config.head_dim)
        self._checkpoint = checkpoint
        self._done = 0
        self._device = parse_device(device)
        self._dtype = dtype or checkpoint.dtype
        self._backend = choose(
            backend, self._device, self._dtype, offload.schemes(checkpoint, self._dtype)
        )
        if self._device.type == "cpu":
            model = StoredModel.of(checkpoint.metadata, str(self._dtype).removeprefix("torch."))
            check_memory(budget.for_scoring(model, *ids.shape))
        self._norm, self._head = self._tail()
        # The embedding stays on the host, as the hidden states do.
        self._hidden = embedding(ids, self._embedding(), self._dtype)
        self._context = ForwardContext.without_past(
            checkpoint.config, ids.shape[1], self._device, self._dtype, kv
        )

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self._checkpoint.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def hidden(self) -> Tensor:
        """The hidden states (W, S, D) after the layers that have been run, on the host."""
        return self._hidden

    @torch.no_grad()
    def advance(self) -> Tensor:
        """Run the next layer over all windows.

        Returns:
            How many tokens went through each of the layer's experts, int64 (E,), on the host.
        """
        config = self._checkpoint.config
        layer = self._layer(self._done)
        tokens = torch.zeros(config.num_local_experts, dtype=torch.int64)
        batch = windows_a_pass(self._hidden.shape[1])
        for first in range(0, len(self._hidden), batch):
            part = self._hidden[first : first + batch]
            with preferred(self._backend):
                x, router_logits = layer(part.to(self._device), self._context)
            self._hidden[first : first + batch] = x.to(self._hidden.device)
            chosen = kernels.route(router_logits, config.num_experts_per_tok).ids
            tokens += torch.bincount(chosen.flatten().cpu(), minlength=len(tokens))
        self._done += 1
        return tokens

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Run all layers; `progress` is called with (layers done, layers)."""
        for index in range(self.layers):
            progress(index, self.layers)
            self.advance()
        progress(self.layers, self.layers)

    @torch.no_grad()
    def log_probabilities(self, window: int, positions: Tensor) -> Tensor:
        """Float32 log-softmax (n, V) at positions int64 (n,) of one window."""
        assert self._done == self.layers, self._done
        x = self._hidden[window, positions].to(self._device)
        with preferred(self._backend):
            logits: Tensor = self._head(self._norm(x))
        return logits.float().log_softmax(-1)

    def _layer(self, index: int) -> DecoderLayer:
        with torch.device("meta"):
            layer = DecoderLayer(self._checkpoint.config, index)
        modules = {f"model.layers.{index}.{name}": m for name, m in layer.named_modules()}
        load.fill(modules, self._checkpoint, self._dtype, self._device)
        return layer.eval()

    def _tail(self) -> tuple[RMSNorm, Linear]:
        config = self._checkpoint.config
        with torch.device("meta"):
            norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            head = Linear(config.hidden_size, config.vocab_size)
        modules: dict[str, nn.Module] = {"model.norm": norm, "lm_head": head}
        load.fill(modules, self._checkpoint, self._dtype, self._device)
        if config.tie_word_embeddings:
            weight = self._embedding()
            if isinstance(weight, Dense):
                weight = Dense(weight.data.to(self._device, self._dtype))
            head.store(weight.to(self._device))
        return norm, head

    def _embedding(self) -> Weight:
        tensors = self._checkpoint.tensors
        return self._checkpoint.weight(next(t for t in tensors if t.kind == "embedding"))
