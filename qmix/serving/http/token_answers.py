"""What a server answers of its tokenizer: what it is, the ids of a text or a chat, their text.

As vLLM does. Knows no HTTP.
"""

from typing import Any

from qmix.serving.http.served_model import ServedModel
from qmix.serving.http.token_request import DetokenizeRequest, TokenizeRequest
from qmix.text.chat_encoder import INST


def described(model: ServedModel) -> dict[str, Any]:
    """The answer of /tokenizer_info."""
    tokenizer = model.tokenizer
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token,
        "chat_template": None if model.template == INST else model.template,
        "model_max_length": model.limits.context,
    }


def tokenized(model: ServedModel, asked: TokenizeRequest) -> dict[str, Any]:
    """The answer of /tokenize.

    Raises:
        ApiError: the conversation does not fit the template, or the model is another.
    """
    model.check_name(asked.model)
    if asked.prompt is None:
        ids = model.chat_ids(asked.messages)
    else:
        ids = model.tokenizer.encode(asked.prompt, add_special_tokens=asked.add_special_tokens)
    names = model.tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": model.limits.context,
        "tokens": ids,
        "token_strs": names,
    }


def detokenized(model: ServedModel, asked: DetokenizeRequest) -> dict[str, Any]:
    """The answer of /detokenize.

    Raises:
        ApiError: the model is another.
    """
    model.check_name(asked.model)
    return {"prompt": model.tokenizer.decode(asked.tokens)}
