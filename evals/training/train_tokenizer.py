"""A sentencepiece tokenizer in the manner of Mixtral's: BPE, byte fallback, single digits, no normalisation.

Trained on the training part of the corpus only. Knows nothing of models.
"""

import io
import sys
from pathlib import Path

import sentencepiece

from qmix.evals.corpus import training_text

VOCABULARY = 2048
UNK, BOS, EOS = 0, 1, 2


def train_tokenizer(text: str, vocabulary: int = VOCABULARY) -> bytes:
    """The bytes of `tokenizer.model`; the same text gives the same bytes.

    Ids 3 to 258 are the bytes, so every string can be written. The one it does not bring back is
    U+2581, with which sentencepiece itself spells the space (as in Mixtral's own tokenizer).
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Line by line: a newline is then never learnt and stays the byte <0x0A>, as in Mixtral's.
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=0.9999,  # the rest, about 60 of 1.8 M characters, is left to the bytes
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation: 2, 4, 6 ... 16 spaces are one piece each
        split_digits=True,
        max_sentence_length=1 << 20,  # longer ones would be dropped in silence
        num_threads=1,  # more would make ties depend on timing
        minloglevel=1,
    )
    return model.getvalue()


def main(arguments: list[str]) -> int:
    """`python -m qmix.evals.training.train_tokenizer OUT/tokenizer.model`."""
    if len(arguments) != 1:
        sys.stderr.write("name the file to write\n")
        return 2
    Path(arguments[0]).write_bytes(train_tokenizer(training_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
