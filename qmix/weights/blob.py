"""How an expert's weights lie in one blob of host memory: tensors on cache lines, blobs on pages.

Arithmetic that reading, storing and planning share. Knows no torch and no weights.
"""

from collections.abc import Iterable, Sequence

from qmix.weights.scheme import Scheme

LINE_BYTES = 64  # a cache line, and the widest vector of a CPU
PAGE_BYTES = 4096
# Tables of a weight whose scales are nested, and the lines on which its eight tensors begin.
TABLE_BYTES = (256 * 4,) * 8
# So many bytes or more that lie together in a file are read together, in whole pages; at most two
# such runs of an expert, at whose ends other tensors have parts of the pages.
TOGETHER_BYTES = 64 << 10
TOGETHER_RUNS = 2
READ_BUFFERS = 2  # blobs beside those of the experts that are kept, for reads under way


def aligned(nbytes: int, to: int = LINE_BYTES) -> int:
    """The next multiple of `to`."""
    return -(-nbytes // to) * to


def blob_bytes(tensors: Sequence[int], *, groups: int = 0, inputs: int = 0) -> int:
    """The most bytes that one weight takes in a blob.

    Args:
        tensors: bytes of each of its tensors in the file.
        groups: how many scales it has, if its codes are integers: the zero of each one becomes a
            byte.
        inputs: how many inputs it has, if its codes are integers: their order is kept as int32.
    """
    total = sum(aligned(nbytes) for nbytes in tensors)
    return total + aligned(groups) + aligned(4 * inputs)


def quantized_bytes(scheme: Scheme, shape: tuple[int, ...], tensors: Sequence[int]) -> int:
    """The most bytes that a quantized weight [N, K] takes in a blob.

    Args:
        tensors: bytes of each of its tensors in the file; if there is only one, the weight is made
            of new tensors.
    """
    if scheme.group_bits is not None or len(tensors) == 1:
        return blob_bytes((scheme.nbytes(shape), *TABLE_BYTES))
    if not scheme.integer:
        return blob_bytes(tensors)
    return blob_bytes(tensors, groups=scheme.groups(shape), inputs=shape[1])


def expert_bytes(weights: Iterable[int]) -> int:
    """The most bytes that an expert takes in a blob, with the pages that are others' in part.

    Args:
        weights: the most bytes of each of its weights.
    """
    total = sum(weights)
    return total + (2 * TOGETHER_RUNS * PAGE_BYTES if total >= TOGETHER_BYTES else 0)
