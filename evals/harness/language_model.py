"""A qmix model as lm_eval's own Hugging Face model: `lm_eval --model qmix`.

How requests are tokenized, begun, truncated, batched and scored is lm_eval's code for transformers
models, HFLM, so a score differs from transformers' by the arithmetic alone. Weights, layers and
kernels are qmix's. Knows no tasks.
"""

from collections.abc import Sequence
from typing import Any

import qmix
from qmix import hf
from qmix.errors import UnsupportedError

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise UnsupportedError(
        "lm_eval's model qmix needs transformers, accelerate and lm_eval",
        found=str(error)[:120],
        remedy="pip install 'qmix-runtime[lm-eval]'.",
    ) from error


@register_model("qmix")
class QmixLM(HFLM):  # type: ignore[misc]
    """The model `qmix` of lm_eval; arguments beyond these are HFLM's."""

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        vram: str | int | None = None,
        ram: str | int | None = None,
        backend: str | None = None,
        kv: str | None = None,
        softmax_dtype: str = "float32",
        **options: Any,
    ) -> None:
        """Load a checkpoint.

        Args:
            pretrained: a folder, a GGUF file, or ORG/NAME of the hub.
            dtype, device, vram, ram, backend, kv: as of `qmix.LoadOptions`.
            softmax_dtype: of the log-probabilities; HFLM's default is the model's own.
            options: of HFLM, such as batch_size, max_length, add_bos_token and prefix_token_id.

        Raises:
            QmixError: see `qmix.load`.
        """
        memory = {"vram": vram, "ram": ram, "backend": backend, "kv": kv}
        model, tokenizer = qmix.load(pretrained, dtype=dtype, device=device, **memory)
        self._ids_to_text = tokenizer
        words = hf.tokenizer(tokenizer)
        words.chat_template = tokenizer.chat_template
        super().__init__(
            hf.adapt(model),
            backend="causal",
            tokenizer=words,
            softmax_dtype=softmax_dtype,
            **options,
        )

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids that stand alone: a space that begins it is dropped, as HFLM's does."""
        ids = [tokens] if isinstance(tokens, int) else list(tokens)
        return self._ids_to_text.decode(ids, skip_special_tokens=skip_special_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval records of a model; nothing is looked up at the hub."""
        runtime = self._model.runtime
        return {
            "model_num_parameters": runtime.num_parameters(),
            "model_dtype": str(runtime.dtype),
            "qmix_version": qmix.__version__,
        }
