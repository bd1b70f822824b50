"""The tokenizer files of a Hugging Face directory, in and out.

Out: a `tokenizer.json` that `AutoTokenizer` loads, and our own file beside it, so that what was exported is imported as the
same tokenizer. In: whatever tokenizer a directory has, with the ids of its control pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxpretrain.convert.tokenizer_json import tokenizer_json
from maxpretrain.data.store import write_atomically
from maxpretrain.data.tokenizer import Characters, HuggingFace, SentencePiece, Tokenizer, load_tokenizer
from maxpretrain.data.tokenizer_base import MANIFEST
from maxpretrain.errors import UserError
from maxpretrain.modelconfig import ModelConfig

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "spm.model")
_SLOW_FILES = ("vocab.txt", "vocab.json", "tekken.json", "sentencepiece.bpe.model")
_DIGEST = "tokenizer_json_sha256"
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_ROLE_OF_ENCODERS = {"bos_token": "cls_token", "eos_token": "sep_token"}  # BERT's names for the same ends of a text

# transformers 5 builds its own tokenizer of these model types from our vocabulary and drops the rest of tokenizer.json,
# whatever tokenizer_class says, unless the directory names a class of its own.
_OVERRIDDEN = ("qwen2",)
_OWN_CLASS = '''"""Loads tokenizer.json as it stands: transformers would else take this model type's usual tokenizer for it."""

from transformers import PreTrainedTokenizerFast


class Tokenizer(PreTrainedTokenizerFast):
    pass
'''

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\n\n  an indented line\r\n",
    "def f(x):\n    return x[0] if x else None  # 3.14159\n",
    " ends with spaces  ",
    "naïve café Ελλάδα Привет 日本語 한국어 العربية e\u0301",
    "😀👩‍👩‍👧\U0001f3f4 \u2028 \u00a0 \ufeff \ufffd \x00",
    "a\u2581b \u2581 \u2016 \u0120",
    "<s> </s> <pad> <unk> <0x41> <|endoftext|> [CLS] [MASK]",
    "https://example.org/a_b?c=1&d=%20",
    "\n",
    " ",
    "",
)
"""Texts whose ids are compared after an export."""


def export_tokenizer(
    tokenizer: Tokenizer,
    directory: Path | str,
    *,
    max_length: int,
    architecture: str = "decoder",
    special: Mapping[str, int] | None = None,
    model_type: str | None = None,
) -> list[str]:
    """Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, our own file, a sentencepiece model too.

    A tokenizer of ours takes control pieces that a text spells for plain text, and so does its export
    (`split_special_tokens`). A `tokenizer.json` from elsewhere keeps the usual rule: chat formats rely on it.

    Args:
        tokenizer: any.
        directory: exists.
        max_length: tokens that the model takes.
        architecture: "decoder", "encoder" or "encoder-decoder"; decoders are padded on the left, where they generate.
        special: ids of further roles by their Hugging Face names (`mask_token`, `cls_token`, `sep_token`), or of `bos_token`,
            `eos_token`, `pad_token`, `unk_token` where they are not the tokenizer's own.
        model_type: some need a file more; None: what the directory's `config.json` says, where it has one.

    Returns:
        What the user should know: probe texts of which the exported file makes other ids. Empty as a rule.

    Raises:
        UserError: an id is not in the vocabulary, pad and eos are the same, or the sentencepiece model is of an unusual kind.
    """
    import tokenizers

    directory = Path(directory)
    data = tokenizer_json(tokenizer)
    made = tokenizers.Tokenizer.from_buffer(data)
    roles = _role_tokens(tokenizer, made, special or {})
    own = not isinstance(tokenizer, HuggingFace)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left" if architecture == "decoder" else "right",
        **({"split_special_tokens": True} if own else {}),
    }
    if (model_type or _read_json(directory / "config.json").get("model_type")) in _OVERRIDDEN:
        config["auto_map"] = {"AutoTokenizer": [None, "tokenization.Tokenizer"]}
        write_atomically(directory / "tokenization.py", _OWN_CLASS.encode())
    tokenizer.save(directory)  # the sentencepiece model, and the manifest
    manifest = json.loads((directory / MANIFEST).read_bytes())
    manifest[_DIGEST] = hashlib.sha256(data).hexdigest()
    _write_json(directory / MANIFEST, manifest)
    write_atomically(directory / "tokenizer.json", data)
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", roles)
    return _differences(tokenizer, made)


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _role_tokens(tokenizer: Tokenizer, made: Any, special: Mapping[str, int]) -> dict[str, str]:
    """The roles' tokens as `tokenizer.json` names them."""
    ids: dict[str, int | None] = {role: getattr(tokenizer, f"{role.removesuffix('_token')}_id") for role in _ROLES}
    ids.update(special)
    if ids["pad_token"] is not None and ids["pad_token"] == ids["eos_token"]:
        raise UserError(
            f"padding and end of sequence are the same id {ids['pad_token']}: no loss would ever see an end; give them ids of their own"
        )
    tokens = {}
    for role, id in ids.items():
        if id is None:
            continue
        token = made.id_to_token(int(id))
        if token is None:
            raise UserError(f"{role} is id {id}, which is not among the tokenizer's {tokenizer.vocab_size} ids")
        tokens[role] = token
    return tokens


def _differences(tokenizer: Tokenizer, made: Any) -> list[str]:
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    probes = PROBES
    if isinstance(tokenizer, Characters) and tokenizer.unk_id is None:
        probes = tuple("".join(c for c in text if c in tokenizer.characters) for text in PROBES)
    other = [
        text for text in probes if tokenizer.encode(text).tolist() != made.encode(text, add_special_tokens=False).ids
    ]
    if not other:
        return []
    same = all(
        sorted(tokenizer.encode(text).tolist()) == sorted(made.encode(text, add_special_tokens=False).ids)
        for text in other
    )
    how = "the same ids in another order, equally likely" if same else "other ids"
    return [
        f"the exported tokenizer.json makes {how} of {len(other)} in {len(probes)} probe texts, such as {other[0]!r}"
    ]


def generation_config(tokenizer: Tokenizer | None, model: ModelConfig) -> dict[str, Any]:
    """What `generation_config.json` holds: where texts begin and end, what pads, what a decoder starts with."""
    config: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        config = {f"{name}_token_id": id for name, id in ids.items() if id is not None}
    if model.decoder_start_id is not None:
        config["decoder_start_token_id"] = model.decoder_start_id
    return config


def import_tokenizer(directory: Path | str, rows: int | None = None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, or None where it has none.

    In this order: the one that `export_tokenizer` wrote, unless `tokenizer.json` was changed since; `tokenizer.json`; a
    sentencepiece model.

    Args:
        directory: what `save_pretrained` or our export wrote.
        rows: of the model's embedding; every id must be below it.

    Raises:
        UserError: a file is damaged or of a kind that is not read, or there are ids that the embedding has no row for.
    """
    directory = Path(directory).expanduser()
    tokenizer = _find(directory)
    if tokenizer is not None and rows is not None and tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer in {directory} has ids up to {tokenizer.vocab_size - 1}, but the model's embedding has {rows} rows; "
            "put the tokenizer there that belongs to these weights, or remove its files"
        )
    return tokenizer


def _find(directory: Path) -> Tokenizer | None:
    fast = directory / "tokenizer.json"
    if (directory / MANIFEST).is_file() and _untouched(directory / MANIFEST, fast):
        return load_tokenizer(directory)
    if fast.is_file():
        return _hugging_face(fast)
    for name in SENTENCEPIECE_FILES:
        if (directory / name).is_file():
            return _sentencepiece(directory / name)
    slow = [name for name in _SLOW_FILES if (directory / name).is_file()]
    if slow:
        raise UserError(
            f"{directory} has its tokenizer only as {slow[0]}, which is not read; load it with transformers' AutoTokenizer and "
            "save_pretrained it there, which writes tokenizer.json, or remove the file to do without"
        )
    return None


def _untouched(manifest: Path, fast: Path) -> bool:
    """Whether `tokenizer.json` is the one that was written along with our own file."""
    stated = _read_json(manifest).get(_DIGEST)
    if stated is None or not fast.is_file():
        return True
    return stated == hashlib.sha256(fast.read_bytes()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: not JSON; fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return value


def _hugging_face(path: Path) -> HuggingFace:
    data = path.read_bytes()
    try:
        guessed = HuggingFace(data)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    added = {t["content"]: t for t in json.loads(data).get("added_tokens") or []}
    find = guessed._tokenizer.token_to_id
    special = {
        f"{role.removesuffix('_token')}_id": find(token) if token is not None else None
        for role, token in _stated_roles(path.parent).items()
        if token is None or find(token) is not None
    }
    # A config.json may hold its class's default ids, which mean nothing here: only a token marked as special is believed.
    marked = {t["id"] for t in added.values() if t.get("special")}
    config = _read_json(path.with_name("config.json"))
    for name in ("bos_id", "eos_id", "pad_id"):
        id = config.get(name.replace("_id", "_token_id"))
        id = id[0] if isinstance(id, list) and id else id
        if name not in special and id in marked:
            special[name] = id
    return HuggingFace(data, special) if special else guessed


def _stated_roles(directory: Path) -> dict[str, str | None]:
    """Roles that `tokenizer_config.json` or `special_tokens_map.json` give a token, or expressly none."""
    roles: dict[str, str | None] = {}
    files = [_read_json(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    for role in _ROLES:
        for key in (role, _ROLE_OF_ENCODERS.get(role, role)):
            for file in files:
                token = file.get(key)
                token = token.get("content") if isinstance(token, dict) else token
                if roles.get(role) is None and key in file and (token is None or isinstance(token, str)):
                    roles[role] = token
    return roles


def _sentencepiece(path: Path) -> SentencePiece:
    from sentencepiece import sentencepiece_model_pb2

    data = path.read_bytes()
    try:
        tokenizer = SentencePiece(data)
    except UserError as error:
        raise UserError(
            f"{path} cannot be used: {error}; save the tokenizer with transformers' save_pretrained, which writes tokenizer.json"
        ) from None
    # The model itself says which pieces are bos, eos and pad; where the files beside it say otherwise, they are right.
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    control = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == p.CONTROL}
    changed = False
    for role, token in _stated_roles(path.parent).items():
        name = role.removesuffix("_token")
        if name != "unk" and token in control and control[token] != getattr(tokenizer, f"{name}_id"):
            setattr(proto.trainer_spec, f"{name}_piece", token)
            changed = True
    return SentencePiece(proto.SerializeToString()) if changed else tokenizer
