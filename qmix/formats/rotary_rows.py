"""The two orders of the rows of q and k: rotary pairs as neighbours, or half a head apart.

Mistral's own files and llama.cpp's have neighbours, Hugging Face's have halves.
"""

from torch import Tensor


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Reorder rotary rows from pairs (2i, 2i + 1) to halves (i, i + d/2) in each head: [H d, ...].

    The order is that of transformers 4's convert_mixtral_weights_to_hf.py. What a row holds does
    not matter: numbers, or the bytes of packed ones.
    """
    rows, *width = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, *width)
    return pairs.transpose(1, 2).reshape(rows, *width)


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    rows, *width = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, *width)
    return halves.transpose(1, 2).reshape(rows, *width)
