"""Folders with a `tokenizer.json`, as transformers' converters make it of a `tokenizer.model`."""

import json
from functools import cache

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing


@cache
def _vocabulary(model):
    """Ids by piece, merges by score as transformers' `generate_merges` has them, and controls."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {sp.id_to_piece(index): index for index in range(sp.get_piece_size())}
    merges = []
    for piece, index in ids.items():
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        halves = [(a, b) for a, b in halves if a in ids and b in ids]
        halves.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(sp.get_score(index), len(a), len(b), (a, b)) for a, b in halves]
    controls = [piece for piece, index in ids.items() if sp.is_control(index)]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return ids, [pair for *_, pair in merges], controls


def fast(model, *, spaces="prepend", added=(), bos="<s>"):
    """A tokenizer of the tokenizers library with the vocabulary of a `tokenizer.model`.

    Args:
        spaces: "prepend" (the Mixtrals of 2023), "metaspace" (the v3 tokenizer: only a beginning
            gets a space), or "none" (what transformers 5 makes of a tokenizer.model alone).
        bos: put before a text; None: nothing is, and there is no post-processor.
    """
    ids, merges, controls = _vocabulary(model)
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepended = [normalizers.Prepend("\u2581")] if spaces == "prepend" else []
        tokenizer.normalizer = normalizers.Sequence(
            [*prepended, normalizers.Replace(" ", "\u2581")]
        )
    if spaces != "none":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [AddedToken(name, special=True, normalized=False) for name in ["<unk>", *controls]]
    tokenizer.add_tokens([*special, *added])
    if bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, ids[bos])],
        )
    return tokenizer


def byte_level():
    """A tokenizer of bytes, as GPT-2's and Llama 3's are, with two merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: index for index, letter in enumerate([*letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(ids, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    return tokenizer


def write(folder, tokenizer, model=None, **config):
    """Write a tokenizer's files into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
