"""A sentencepiece tokenizer like Mixtral's: BPE, byte fallback, single digits, no normalisation.

`python -m qmix.evals.training.train_tokenizer OUT/tokenizer.model` trains it on the training part
of the corpus. Knows nothing of models.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from qmix.evals.command import exit_code
from qmix.evals.corpus import training_text
from qmix.files import atomic_file

VOCABULARY = 2048
UNK, BOS, EOS = 0, 1, 2


def train_tokenizer(text: str, vocabulary: int = VOCABULARY) -> bytes:
    """The bytes of a `tokenizer.model`; the same text gives the same bytes.

    Ids 3 to 258 are the bytes, so every string can be encoded. Only U+2581 does not come back,
    because sentencepiece itself spells the space with it (as in Mixtral's own tokenizer).
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Line by line, so that no newline is learnt and it stays the byte <0x0A>, as in Mixtral's.
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=0.9999,  # bytes encode the rest, about 60 of 1.8 M characters
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation of 2, 4, 6 ... 16 spaces is one piece
        split_digits=True,
        max_sentence_length=1 << 20,  # longer lines would be dropped silently
        num_threads=1,  # with more, ties would depend on timing
        minloglevel=1,
    )
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m qmix.evals.training.train_tokenizer", description=__doc__
    )
    parser.add_argument("out", type=Path, help="the tokenizer.model to write")
    options = parser.parse_args(arguments)
    return exit_code(
        "train_tokenizer",
        lambda: atomic_file.write(options.out, train_tokenizer(training_text())),
    )


if __name__ == "__main__":
    sys.exit(main())
