"""Text to ids and back: sentencepiece, Hugging Face `tokenizer.json`, bytes, characters; one small interface.

`decode(encode(x)) == x` for every tokenizer trained here: normalization is the identity, newlines and runs of spaces are
kept, and what has no piece becomes bytes. Ids of control pieces (bos, eos, pad) never come out of `encode`, whatever the
text says: a document that spells `</s>` must not end itself.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from maxpretrain.config import TokenizerConfig
from maxpretrain.data.store import canonical
from maxpretrain.data.tokenizer_base import MANIFEST, SPECIAL, Tokenizer, fingerprint
from maxpretrain.data.tokenizer_plain import Bytes, Characters
from maxpretrain.errors import UserError

__all__ = ["Bytes", "Characters", "HuggingFace", "SentencePiece", "Tokenizer", "load_tokenizer", "train_tokenizer"]

_SPACE = "\u2581"  # sentencepiece's stand-in for a space
_RESERVED = re.compile(
    "\n+|[\u2581\u2585\u0001]+"
)  # newlines apart from words; characters that the trainer keeps for itself
_DELIMITER = "\u0001"
_TRAIN_THREADS = (
    16  # a constant: sums of a unigram model's counts depend on it in the last bits, and so would the pieces
)


class SentencePiece(Tokenizer):
    """A sentencepiece model.

    Args:
        model: the bytes of a `.model` file.

    Raises:
        UserError: they are not a model.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError("not a sentencepiece model") from None
        p = self._processor
        self.vocab_size = p.get_piece_size()
        self.unk_id, self.bos_id, self.eos_id = (i if i >= 0 else None for i in (p.unk_id(), p.bos_id(), p.eos_id()))
        self.pad_id = p.pad_id() if p.pad_id() >= 0 and p.pad_id() != self.eos_id else None
        self.fingerprint = fingerprint(self.kind, model)
        self._table = [self._bytes_of(i) for i in range(self.vocab_size)]
        space = [p.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        self._space_ids = space if all(p.is_byte(i) for i in space) else None
        probe = " a  b\n\n\tc\r\n é😀 "
        self._exact = super().decode(p.encode(probe)) == probe

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePiece, (self._model,)

    def _bytes_of(self, id: int) -> bytes:
        p = self._processor
        if p.is_control(id):
            return b""
        if p.is_unknown(id):
            return "\ufffd".encode()
        piece = p.id_to_piece(id)
        return bytes([int(piece[3:5], 16)]) if p.is_byte(id) else piece.replace(_SPACE, " ").encode()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        ids = self._processor.encode(list(texts), num_threads=threads)
        if self._exact and self._space_ids:
            for i, text in enumerate(texts):
                if _SPACE in text:
                    ids[i] = self._with_literal_spaces(text)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    def _with_literal_spaces(self, text: str) -> list[int]:
        # sentencepiece cannot tell the character U+2581 from a space: it goes as bytes.
        first, *others = self._processor.encode(text.split(_SPACE))
        return first + [i for part in others for i in (*self._space_ids, *part)]

    def decode(self, ids: Iterable[int]) -> str:
        if self._exact:
            return super().decode(ids)
        return self._processor.decode([int(i) for i in ids])

    def piece(self, id: int) -> str:
        return self._processor.id_to_piece(int(id))

    @cached_property
    def named(self) -> dict[str, int]:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(self._model)
        kinds = (proto.SentencePiece.CONTROL, proto.SentencePiece.USER_DEFINED)
        return {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type in kinds}

    def piece_bytes(self, id: int) -> bytes:
        return self._table[id]

    def _files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}


class HuggingFace(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` package.

    Its truncation and padding are switched off, and special tokens spelt out in a text are plain text.

    Args:
        data: the bytes of the file.
        special: ids by name (`bos_id`, …), from the files beside it; missing ones are recognized by their usual names.

    Raises:
        UserError: it cannot be parsed.
    """

    kind = "huggingface"
    _USUAL: ClassVar[dict[str, tuple[str, ...]]] = {
        "bos_id": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|startoftext|>"),
        "eos_id": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[SEP]"),
        "pad_id": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
        "unk_id": ("<unk>", "[UNK]"),
    }

    def __init__(self, data: bytes, special: dict[str, int | None] | None = None):
        import tokenizers

        self._data = data
        try:
            tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"not a tokenizer.json that the tokenizers package reads ({str(error)[:100]})") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        for name, usual in self._USUAL.items():
            found = next((vocabulary[t] for t in usual if t in vocabulary), None)
            setattr(self, name, found if special is None or name not in special else special[name])
        if self.pad_id == self.eos_id:
            self.pad_id = None
        self._special = {name: getattr(self, name) for name in SPECIAL}
        self.fingerprint = fingerprint(self.kind, data, canonical(self._special))

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFace, (self._data, self._special)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        if threads > 1 and len(texts) > 1:
            ids = [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        else:
            ids = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    def encode_marked(self, text: str) -> np.ndarray:
        self._tokenizer.encode_special_tokens = False
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._tokenizer.encode_special_tokens = True

    @cached_property
    def named(self) -> dict[str, int]:
        return {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()}

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        from tokenizers.decoders import DecodeStream

        done, seen = "", []
        stream = DecodeStream(skip_special_tokens=True)
        for i in ids:
            seen.append(int(i))
            text = stream.step(self._tokenizer, int(i)) or ""
            done += text
            yield text
        yield self.decode(seen)[len(done) :]

    def piece(self, id: int) -> str:
        return self._tokenizer.id_to_token(int(id)) or ""

    def piece_bytes(self, id: int) -> bytes:
        return self.decode([id]).encode()

    def _files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._data}


def load_tokenizer(path: Path | str, kind: str | None = None) -> Tokenizer:
    """Loads what `save` wrote, a `.model`, a `tokenizer.json`, or a folder that holds one of them.

    Raises:
        UserError: nothing usable is there, its kind is not `kind`, or a file was changed after `save`.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            names = [n for n in (MANIFEST, "tokenizer.json", "tokenizer.model") if (path / n).is_file()]
            if not names:
                raise UserError(f"{path} holds no tokenizer ({MANIFEST}, tokenizer.json or tokenizer.model)")
            path = path / names[0]
        data = path.read_bytes()
        tokenizer = _parse_manifest(path, data) if path.name == MANIFEST else _parse(path, data)
    except FileNotFoundError as error:
        raise UserError(f"tokenizer file {error.filename} not found; check tokenizer.path") from None
    except OSError as error:
        raise UserError(f"tokenizer file {error.filename} cannot be read: {error.strerror}") from None
    if kind is not None and tokenizer.kind != kind:
        raise UserError(
            f'{path} is a {tokenizer.kind} tokenizer, but tokenizer.kind is "{kind}"; set it to "{tokenizer.kind}"'
        )
    return tokenizer


def _parse(path: Path, data: bytes) -> Tokenizer:
    try:
        if data.lstrip()[:1] == b"{":
            return HuggingFace(data, _special_beside(path))
        return SentencePiece(data)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def _special_beside(path: Path) -> dict[str, int | None]:
    """Ids of control pieces as `tokenizer_config.json` beside a `tokenizer.json` names them."""
    config_path = path.with_name("tokenizer_config.json")
    if not config_path.is_file():
        return {}
    try:
        config = json.loads(config_path.read_bytes())
        added = {t["content"]: t["id"] for t in json.loads(path.read_bytes()).get("added_tokens", [])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{config_path} is not the JSON expected beside a tokenizer.json") from None
    special = {}
    for name in SPECIAL:
        token = config.get(name.replace("_id", "_token"))
        token = token.get("content") if isinstance(token, dict) else token
        if token in added:
            special[name] = added[token]
    return special


def _parse_manifest(path: Path, data: bytes) -> Tokenizer:
    try:
        manifest = json.loads(data)
        kind, stated = manifest["kind"], manifest["fingerprint"]
        if kind == "sentencepiece":
            tokenizer: Tokenizer = SentencePiece((path.parent / "tokenizer.model").read_bytes())
        elif kind == "huggingface":
            tokenizer = HuggingFace((path.parent / "tokenizer.json").read_bytes(), {n: manifest[n] for n in SPECIAL})
        elif kind == "bytes":
            tokenizer = Bytes(manifest["symbols"], manifest.get("controls", ()))
        elif kind == "characters":
            tokenizer = Characters(manifest["characters"], manifest["symbols"], manifest.get("controls", ()))
        else:
            raise UserError(f'{path} names the unknown kind "{kind}"')
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: not the JSON that was written") from None
    if tokenizer.fingerprint != stated:
        raise UserError(
            f"the tokenizer in {path.parent} was changed after it was saved (fingerprint {tokenizer.fingerprint[:12]}, not {stated[:12]})"
        )
    return tokenizer


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Makes the tokenizer that `config` asks for from `texts`: a sentencepiece model, or the set of characters.

    Raises:
        UserError: `config` cannot be had from these texts; the message names the vocabulary size that can.
    """
    if config.kind == "bytes":
        return Bytes(config.user_symbols, config.control_symbols)
    if config.kind == "characters":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        if not characters:
            raise UserError("the corpus holds no text to take the tokenizer's characters from; check data.train")
        return Characters(characters, config.user_symbols, config.control_symbols)
    if config.kind == "huggingface":
        raise UserError(
            'tokenizer.kind "huggingface" loads a tokenizer.json; set tokenizer.path, or train with tokenizer.kind "sentencepiece"'
        )
    return SentencePiece(_with_controls(_train_sentencepiece(config, texts), config.control_symbols))


def _train_sentencepiece(config: TokenizerConfig, texts: Iterable[str]) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    count = 0

    def sentences() -> Iterator[str]:
        nonlocal count
        for text in texts:
            for start in range(0, len(text), 1 << 20):
                count += 1
                # Pieces stop at newlines, which also makes words repeat and training several times faster.
                yield _RESERVED.sub(
                    lambda m: _DELIMITER + (m[0] if m[0][0] == "\n" else "") + _DELIMITER,
                    text[start : start + (1 << 20)],
                )

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type=config.algorithm,
            vocab_size=max(config.vocab_size - len(config.control_symbols), 8),  # fewer it cannot explain
            user_defined_symbols=list(config.user_symbols),
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            pretokenization_delimiter=_DELIMITER,
            character_coverage=0.9995,
            num_sub_iterations=1,  # of expectation maximization: a third less time than 2, and no more tokens
            max_sentence_length=1 << 23,  # bytes; the default drops longer texts in silence
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=_TRAIN_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(config, str(error), count) from None
    return _rounded(model.getvalue()) if config.algorithm == "unigram" else model.getvalue()


def _with_controls(model: bytes, names: Sequence[str]) -> bytes:
    """The model with control pieces at the end: the trainer would put them in front, and T5's sentinels count down from the end.

    Raises:
        UserError: a piece has that name already, such as one of `tokenizer.user_symbols`.
    """
    if not names:
        return model
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for name in names:
        if any(piece.piece == name for piece in proto.pieces) or not name:
            raise UserError(
                f'the control symbol "{name}" is a piece of the vocabulary already; take it out of tokenizer.user_symbols'
            )
        proto.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.CONTROL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _rounded(model: bytes) -> bytes:
    """The model with scores that are multiples of 1/128.

    The sums of such scores are exact, so which of two equal segmentations wins does not depend on the text before, nor on
    whose code adds them up: an exported tokenizer makes the same ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        if piece.type == proto.SentencePiece.NORMAL:
            piece.score = round(piece.score * 128) / 128
    return proto.SerializeToString()


def _explain(config: TokenizerConfig, message: str, count: int) -> UserError:
    """sentencepiece's own words, turned into what to do."""
    controls = len(config.control_symbols)
    high = re.search(r"value\s*<=\s*(\d+)", message)
    if high:
        return UserError(
            f"tokenizer.vocab_size {config.vocab_size} is more than the corpus allows; use at most {int(high[1]) + controls}, or give "
            "more text"
        )
    low = re.search(r"smaller than required_chars\D*\d+\s+vs\s+(\d+)", message)
    if low:
        beside = f", 256 bytes and {controls} control symbols" if controls else " and 256 bytes"
        return UserError(
            f"tokenizer.vocab_size {config.vocab_size} is too small for the corpus's characters{beside}; use at least "
            f"{int(low[1]) + controls}"
        )
    if count == 0 or "required_chars_" in message:
        return UserError("the corpus holds no text to train a tokenizer on; check data.train")
    return UserError(
        f"sentencepiece could not train a tokenizer of {config.vocab_size} pieces: {message.strip()[:200]}"
    )
