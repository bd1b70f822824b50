"""A `tokenizer.json` of the `tokenizers` package that gives the ids of any of our tokenizers.

Sentencepiece models keep their ids. Their spaces are plain spaces here and not U+2581, so that a text that spells U+2581
goes as bytes, as it does with us. Two more things differ from the usual conversion, for the sake of the same ids:

* A unigram model with byte pieces works on bytes, written in GPT-2's byte alphabet. On characters, the vocabulary's
  `<0x41>` and `<s>` would be found in a text that spells them. sentencepiece gives an unknown character the lowest score
  less 10, whatever its length; here its first byte has that score and its other bytes have 0, which is the same sum.
* A BPE model's pieces are merged by score, and sentencepiece merges any two neighbours whose union is a piece. So every way
  to cut a piece in two is a merge; those of one piece stand in the order that takes the leftmost of two that overlap.

What remains:

* Where segmentations of a unigram model are equally likely to about 1e-6 (mostly the same pieces in another order, as in a
  run of dashes), sentencepiece chooses by how its float32 sums happen to round; `tokenizers` sums in float64. Models whose
  scores are multiples of 1/128 have exact sums in both, and so the same ids, but for user symbols that overlap themselves.
* The table of a model that normalizes (none trained here does) is applied to a character along with its combining marks by
  `tokenizers`, which swallows a mark behind a space.
* Bytes that are no UTF-8 decode to U+FFFD each with BPE, and with us to one for each broken character.

Reference: T. Kudo, "Subword Regularization", 2018, arXiv:1804.10959, section 3.2 (the unigram model); R. Sennrich et al.,
"Neural Machine Translation of Rare Words with Subword Units", 2016, arXiv:1508.07909 (BPE).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from maxpretrain.data.tokenizer import Bytes, Characters, HuggingFace, SentencePiece, Tokenizer
from maxpretrain.data.tokenizer_base import SPECIAL
from maxpretrain.errors import UserError

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"  # sentencepiece's stand-in for a space
_MARK = "\u2016"  # sets a name apart that no text may reach; not in the byte alphabet
_NEVER = -1e30  # score of a piece that a text must not reach; every text has another way through
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # types of sentencepiece's pieces


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The file's content. Spelt-out control pieces are plain text only under `split_special_tokens`.

    Raises:
        UserError: the sentencepiece model is of a kind that `tokenizers` has not.
    """
    if isinstance(tokenizer, HuggingFace):
        return tokenizer._files()["tokenizer.json"]
    if isinstance(tokenizer, SentencePiece):
        made = _sentencepiece(tokenizer)
    elif isinstance(tokenizer, Bytes):
        made = _bytes(tokenizer)
    elif isinstance(tokenizer, Characters):
        made = _characters(tokenizer)
    else:
        raise TypeError(type(tokenizer))
    return made.to_str(pretty=True).encode()


def byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where it is printable Latin-1, others from U+0100 on.

    Reference: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2 and its code.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


_ALPHABET = byte_alphabet()


def _spell(text: str) -> str:
    """`text` in the byte alphabet."""
    return "".join(_ALPHABET[b] for b in text.encode())


def _finish(made: tokenizers.Tokenizer, control: Iterable[str]) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken

    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return made


def _unreachable(name: str, taken: Iterable[str]) -> str:
    """A name that no text has, for an id that ours never gives either."""
    name = _MARK + name
    while name in taken:
        name = _MARK + name
    return name


# sentencepiece


class _Piece(NamedTuple):
    name: str  # as a text has it
    type: int  # _UNUSED is whatever no text can have
    score: float


def _sentencepiece(tokenizer: SentencePiece) -> tokenizers.Tokenizer:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer._files()["tokenizer.model"])
    trainer = proto.trainer_spec
    kind = trainer.ModelType.Name(trainer.model_type).lower()
    if (
        kind not in ("unigram", "bpe")
        or trainer.treat_whitespace_as_suffix
        or not proto.normalizer_spec.escape_whitespaces
    ):
        what = f"of type {kind}" if kind not in ("unigram", "bpe") else "that does not keep spaces before words"
        raise UserError(f"a sentencepiece model {what} has no tokenizer.json; export a run with a unigram or BPE model")
    # A model that never saw a space has no piece for it, and spells out the bytes of U+2581.
    spaces = any(p.piece == _SPACE and p.type == _NORMAL for p in proto.pieces)
    pieces = [_piece(p, " " if spaces else _SPACE) for p in proto.pieces]
    normalizer = _normalizer(proto.normalizer_spec, tokenizer._exact and tokenizer._space_ids is not None, spaces)
    if kind == "bpe":
        made = _bpe(pieces, trainer.byte_fallback, normalizer, tokenizer)
        after: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    elif trainer.byte_fallback:
        made = _unigram_of_bytes(pieces)
        after = [decoders.Replace(_MARK, ""), decoders.ByteLevel()]
    else:
        made = _unigram_of_characters(pieces)
        after = [decoders.Fuse()]
    made.normalizer = normalizer
    if not spaces:
        after.append(decoders.Replace(_SPACE, " "))
    if proto.normalizer_spec.add_dummy_prefix:
        after.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(after)
    return _finish(made, [p.name for p in pieces if p.type in (_CONTROL, _UNKNOWN)])


def _piece(piece: Any, space: str) -> _Piece:
    if piece.type in (_CONTROL, _UNKNOWN, _BYTE):
        return _Piece(piece.piece, piece.type, piece.score)
    name = piece.piece.replace(_SPACE, space)
    if piece.type == _UNUSED or " " in piece.piece:  # every space of a text becomes U+2581 before it meets a piece
        return _Piece(name, _UNUSED, piece.score)
    if piece.type == _USER:  # what sentencepiece takes instead of the score in the file, so that it wins
        return _Piece(name, _USER, float(np.float32(0.1 * (len(piece.piece.encode()) - 1))))
    return _Piece(name, _NORMAL, piece.score)


def _normalizer(spec: Any, literal: bool, spaces: bool) -> Any:
    """What comes before the pieces, or None.

    Args:
        spec: sentencepiece's NormalizerSpec.
        literal: whether a spelt-out U+2581 is itself; elsewhere sentencepiece takes it for a space.
        spaces: whether pieces have plain spaces, and not U+2581.
    """
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if not literal:
        steps.append(normalizers.Replace(_SPACE, " "))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" +$"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if not spaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps) if steps else None


def _lowest(pieces: list[_Piece]) -> float:
    return min((p.score for p in pieces if p.type == _NORMAL), default=0.0)


def _unigram(names: dict[str, float], pieces: list[_Piece]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import models

    unknown = next((i for i, p in enumerate(pieces) if p.type == _UNKNOWN), None)
    return tokenizers.Tokenizer(models.Unigram(list(names.items()), unk_id=unknown, byte_fallback=False))


def _unigram_of_bytes(pieces: list[_Piece]) -> tokenizers.Tokenizer:
    from tokenizers import pre_tokenizers

    unknown = float(np.float32(_lowest(pieces)) - np.float32(10))
    names: dict[str, float] = {}
    matched = {_spell(p.name) for p in pieces if p.type in (_NORMAL, _USER)}
    for p in pieces:
        if p.type in (_NORMAL, _USER):
            names[_spell(p.name)] = p.score
        elif p.type in (_CONTROL, _UNKNOWN):
            names[p.name] = _NEVER
        elif p.type == _UNUSED:
            names[_unreachable(_spell(p.name), names)] = _NEVER
        else:
            byte = int(p.name[3:5], 16)
            name = _ALPHABET[byte]
            if name in matched:  # an ASCII character with a piece of its own
                names[_unreachable(name, names)] = _NEVER
            else:
                names[name] = 0.0 if 0x80 <= byte < 0xC0 else unknown
    made = _unigram(names, pieces)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made


def _unigram_of_characters(pieces: list[_Piece]) -> tokenizers.Tokenizer:
    """Without byte pieces, where an unknown character is `<unk>`."""
    from tokenizers import Regex, pre_tokenizers

    lowest = _lowest(pieces)  # `tokenizers` takes the score of unknown characters from the lowest of all
    names: dict[str, float] = {}
    for p in pieces:
        if p.type in (_NORMAL, _USER):
            names[p.name] = p.score
        else:
            names[p.name if p.type in (_CONTROL, _UNKNOWN) else _unreachable(p.name, names)] = lowest
    made = _unigram(names, pieces)
    # A cut within every spelt-out control piece keeps a text from meeting it; beside a known character, since neighbours
    # that are both unknown are one `<unk>` and must not be parted.
    cuts = []
    for p in pieces:
        if p.type in (_CONTROL, _UNKNOWN) and len(p.name) > 1:
            known = (i for i in range(1, len(p.name)) if p.name[i - 1] in names or p.name[i] in names)
            at = next(known, 1)
            cuts.append(f"{re.escape(p.name[:at])}(?={re.escape(p.name[at:])})")
    if cuts:
        made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(cuts)), "merged_with_previous")
    return made


def _bpe(pieces: list[_Piece], byte_fallback: bool, normalizer: Any, tokenizer: SentencePiece) -> tokenizers.Tokenizer:
    """User symbols are looked up whole, rather than be added tokens: transformers makes an added token with a role, such as
    a mask, special, and would then not find it in a text (`split_special_tokens`). Looking up finds other things too, so
    everything that it could find is tried, and the symbols are added tokens if sentencepiece makes other pieces of any.
    """
    import tokenizers
    from tokenizers import AddedToken, models

    names: dict[str, int] = {}
    for i, p in enumerate(pieces):
        names[_unreachable(p.name, names) if p.type == _UNUSED else p.name] = i
    normal = {p.name: p.score for p in pieces if p.type == _NORMAL}
    users = [p.name for p in pieces if p.type == _USER]
    options = {
        "vocab": names,
        "merges": _merges(normal),
        "unk_token": next((p.name for p in pieces if p.type == _UNKNOWN), None),
        "fuse_unk": not byte_fallback,
        "byte_fallback": byte_fallback,
    }
    if not users:
        return tokenizers.Tokenizer(models.BPE(**options))
    texts = [name for name in names if name not in users]
    texts += [users[0] + text for text in texts]
    made = _bpe_that_looks_up(options, users, normal)
    made.normalizer = normalizer
    theirs = made.encode_batch(texts, add_special_tokens=False)
    if all(tokenizer.encode(text).tolist() == e.ids for text, e in zip(texts, theirs, strict=True)):
        return made
    made = tokenizers.Tokenizer(models.BPE(**options))
    made.add_tokens([AddedToken(name, normalized=False, special=False) for name in users])
    return made


def _bpe_that_looks_up(options: dict[str, Any], users: list[str], normal: Iterable[str]) -> tokenizers.Tokenizer:
    """BPE that finds user symbols by cutting the text at them and looking up the parts whole (`ignore_merges`)."""
    import tokenizers
    from tokenizers import Regex, models, pre_tokenizers

    made = tokenizers.Tokenizer(models.BPE(**options, ignore_merges=True))
    symbols = "|".join(map(re.escape, sorted(users, key=len, reverse=True)))
    # A part that spells no more than the name of a byte or control piece is cut once more, so that it is not found.
    names = [n for n in options["vocab"] if n not in users and n not in normal]
    spelt = "|".join(rf"{re.escape(n[0])}(?={re.escape(n[1:])}\z)" for n in names if len(n) > 1)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(symbols), "isolated"), pre_tokenizers.Split(Regex(rf"\A(?:{spelt})"), "isolated")]
    )
    return made


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    merges = []
    for piece in sorted(scores, key=lambda p: -scores[p]):
        cuts = [i for i in range(1, len(piece)) if piece[:i] in scores and piece[i:] in scores]
        # Of pieces x, y, z where both xy and yz spell `piece`, xy must win: `piece` then repeats with the length of x.
        cuts.sort(key=lambda i: (piece[: len(piece) - i] != piece[i:], -i))
        merges += [(piece[:i], piece[i:]) for i in cuts]
    return merges


# bytes and characters


def _symbols(tokenizer: Any) -> tuple[list[str], list[str]]:
    """User symbols that a text can have, in the order in which they are looked for, and those that are control pieces."""
    control = [s for s in tokenizer.symbols if tokenizer.is_control(s)]
    return sorted((s for s in tokenizer.symbols if s not in control), key=len, reverse=True), control


def _vocabulary(tokenizer: Any, spell: Callable[[str], str], alphabet: Iterable[str]) -> dict[str, int]:
    matched, _ = _symbols(tokenizer)
    symbols = [spell(s) if s in matched else s for s in tokenizer.symbols]
    names: dict[str, int] = {}
    for i, name in enumerate([*alphabet, *symbols]):
        # A character that is a user symbol too has the symbol's id and never its own.
        names[_unreachable(name, names) if name in symbols and i < tokenizer._alphabet else name] = i
    return names


def _bytes(tokenizer: Bytes) -> tokenizers.Tokenizer:
    """BPE without merges. `ignore_merges` takes a user symbol whole; a cut keeps it from control pieces."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    matched, control = _symbols(tokenizer)
    made = tokenizers.Tokenizer(models.BPE(_vocabulary(tokenizer, _spell, _ALPHABET), [], ignore_merges=True))
    begin = sorted({name[0] for name in control})
    cut = pre_tokenizers.Split(Regex("|".join(map(re.escape, [*matched, *begin, "<"]))), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.Sequence([decoders.Replace(_MARK, ""), decoders.ByteLevel()])
    return _finish(made, control)


def _characters(tokenizer: Characters) -> tokenizers.Tokenizer:
    """A word is a user symbol or a character. Without `<unk>` an unknown character is an error, as it is with us."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    matched, control = _symbols(tokenizer)
    names = _vocabulary(tokenizer, str, tokenizer.characters)
    made = tokenizers.Tokenizer(models.WordLevel(names, unk_token=SPECIAL["unk_id"]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, matched), r"[\s\S]"])), "isolated")
    made.decoder = decoders.Fuse()
    return _finish(made, control)
