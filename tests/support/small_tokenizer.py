"""A tokenizer.model of any size, for models whose vocabulary is smaller than a real one's."""

from qmix.formats import open_checkpoint
from qmix.text.vocabulary import CONTROL, NORMAL, UNKNOWN, Vocabulary, model_bytes


def small_tokenizer(size):
    """The bytes of a `tokenizer.model` of `size` pieces: three special ones, letters, numbers."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [f"▁{index}" for index in range(size - len(pieces))]
    vocabulary = Vocabulary(
        pieces=pieces,
        scores=[0.0] * 3 + [-float(index) / 3 for index in range(size - 3)],
        types=[UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (size - 3),
        bos=1,
        eos=2,
        unk=0,
        space_prefix=True,
        where="tokenizer.model",
    )
    return model_bytes(vocabulary)


def add_tokenizer(folder):
    """Put a tokenizer of its vocabulary's size beside a checkpoint."""
    size = open_checkpoint(folder).config.vocab_size
    (folder / "tokenizer.model").write_bytes(small_tokenizer(size))
