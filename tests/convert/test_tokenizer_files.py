"""Tokenizer files: the same ids from `tokenizer.json` as from ours, for any text; and every way in."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from maxpretrain.config import TokenizerConfig
from maxpretrain.convert.tokenizer_json import tokenizer_json
from maxpretrain.convert.tokenizers import export_tokenizer, generation_config, import_tokenizer
from maxpretrain.data.tokenizer import Bytes, Characters, HuggingFace, SentencePiece, train_tokenizer
from maxpretrain.errors import UserError
from maxpretrain.modelconfig import ModelConfig

TEXTS = [
    f"The quick brown fox jumps over the lazy dog.\n\n  And again it jumps, over {i} dogs;\n    if x[{i}] == '--':\n        return\n"
    for i in range(300)
]
# " a" is a symbol that sentencepiece never finds: it looks for U+2581 where a text has a space.
SYMBOLS = ("<mask>", "<a,b>", "«x»", "|>", "|", " a")
PLAIN_SYMBOLS = (*SYMBOLS, "\n\n\n", "<s>", "</s>", "<pad>", "<unk>", "é", "Ġ", "e", "<", "#[x]\\-&~ ", "日本")
CONTROLS = ("[NLU]", "<extra_id_1>", "<extra_id_0>")
HARD = [
    *"ab c\n\t \r▁▅é😀\x01\0\u2028\ufffd\u0301\ufeffĠ‖#«",
    *(
        "  ",
        "    ",
        "\n\n",
        "---",
        "</s>",
        "<s>",
        "<unk>",
        "<pad>",
        "<0x41>",
        "<0xE9>",
        "The",
        " fox",
        "日本語",
        "👩‍👩‍👧",
    ),
    *SYMBOLS,
    *CONTROLS,
]


def fuzz(count, parts=HARD, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(parts, k=rng.randrange(30))) for _ in range(count)]


def rounded(tokenizer):
    """The model with scores that add up exactly, in whatever order."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer._files()["tokenizer.model"])
    for piece in proto.pieces:
        piece.score = round(piece.score * 128) / 128
    return SentencePiece(proto.SerializeToString())


def hugging_face():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.enable_truncation(4)
    return HuggingFace(made.to_str().encode())


@pytest.fixture(scope="module")
def kinds():
    def train(algorithm, symbols=SYMBOLS, controls=()):
        config = TokenizerConfig(algorithm=algorithm, vocab_size=420, user_symbols=symbols, control_symbols=controls)
        return train_tokenizer(config, TEXTS)

    return {
        "unigram": rounded(train("unigram")),
        "unigram with controls": train("unigram", (), CONTROLS),
        "bpe": train("bpe", controls=CONTROLS),
        "bpe without symbols": train("bpe", ()),
        "bytes": Bytes(PLAIN_SYMBOLS, CONTROLS),
        "bytes alone": Bytes(),
        "characters": Characters("".join(HARD + TEXTS), PLAIN_SYMBOLS, CONTROLS),
        "characters alone": Characters("".join(HARD + TEXTS)),
        "huggingface": hugging_face(),
    }


KINDS = (
    "unigram",
    "unigram with controls",
    "bpe",
    "bpe without symbols",
    "bytes",
    "bytes alone",
    "characters",
    "characters alone",
    "huggingface",
)


def loaded(data):
    """As AutoTokenizer has it with `split_special_tokens`."""
    made = tokenizers.Tokenizer.from_buffer(data)
    made.encode_special_tokens = True
    made.no_truncation()
    return made


def ids(made, text):
    return made.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids(kinds, kind):
    ours = kinds[kind]
    made = loaded(tokenizer_json(ours))
    assert made.get_vocab_size() == len(made.get_vocab()) == ours.vocab_size
    runs = [c * n for c in (" ", "-", "\n", "é", "a b") for n in range(60)]
    for text in ("", *HARD, *TEXTS[:50], "".join(TEXTS), *fuzz(1500), *runs):
        expected = ours.encode(text).tolist()
        assert ids(made, text) == expected, text
        assert made.decode(expected, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_the_same_ids_with_awkward_symbols(kinds, kind):
    made = loaded(tokenizer_json(kinds[kind]))
    for text in fuzz(1500, [*PLAIN_SYMBOLS, *"ab\n e日本.*#<s"], seed=1):
        assert ids(made, text) == kinds[kind].encode(text).tolist(), text


def test_characters_that_are_not_known():
    with pytest.raises(Exception, match="UNK"):
        ids(loaded(tokenizer_json(Characters("ab"))), "abc")
    assert ids(loaded(tokenizer_json(Characters("ab", ("<unk>",)))), "axb") == [0, 2, 1]


def model(kind, pieces, users=(), **normalizer):
    """A sentencepiece model made by hand."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = {"unigram": 1, "bpe": 2, "word": 3}[kind]
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.pad_id = 3
    for name in ("remove_extra_whitespaces", "add_dummy_prefix"):
        setattr(proto.normalizer_spec, name, normalizer.get(name, False))
    for name, type in (("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<pad>", 3), *((u, 4) for u in users)):
        proto.pieces.add(piece=name, score=0, type=type)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=6)
    for name, score in pieces.items():
        proto.pieces.add(piece=name, score=score)
    return SentencePiece(proto.SerializeToString())


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_any_model_over_a_small_alphabet(kind):
    rng = random.Random(0)
    spelt = ["a", "b", "a", "b", " ", "c", "é", "<", ">", "<s>", "</s>", "<0x41>", "<m>", "▁"]
    for trial in range(60):
        users = rng.choice([(), ("<m>",), ("ab", "<m>"), ("é", "<")])
        pieces = [c for c in rng.choice(["ab▁", "ab", "abc▁", "a<▁s>/"]) if c not in users]
        for _ in range(rng.randrange(5, 60)):
            piece = rng.choice(pieces) + rng.choice(pieces)
            if piece not in (*pieces, *users, "<s>", "</s>") and len(piece) < 9:
                pieces.append(piece)
        rng.shuffle(pieces)
        scores = {p: -i if kind == "bpe" else -rng.randrange(1, 1500) / 128 for i, p in enumerate(pieces)}
        ours = model(kind, scores, users)
        made = loaded(tokenizer_json(ours))
        for text in fuzz(60, spelt if trial % 2 else ["a", "b"], seed=trial):
            assert ids(made, text) == ours.encode(text).tolist(), (pieces, users, text)


def test_of_two_overlapping_merges_the_left_one_wins():
    ours = model("bpe", {"ab": -1, "ba": -2, "aba": -3, "a": -8, "b": -9})
    made = loaded(tokenizer_json(ours))
    for text, pieces in (("ababa", "ab aba"), ("aba", "aba"), ("babab", "b ab ab"), ("abaaba", "aba aba")):
        assert [ours.piece(i) for i in ours.encode(text)] == pieces.split(), text
        assert ids(made, text) == ours.encode(text).tolist()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_models_that_put_a_space_in_front(kind):
    pieces = {"▁": -3.0, "▁a": -1.0, "a": -2.0, "b": -2.5, "ab": -1.5}
    for extra in (False, True):
        ours = model(kind, pieces, ("<m>",), add_dummy_prefix=True, remove_extra_whitespaces=extra)
        made = loaded(tokenizer_json(ours))
        for text in ("", "a", " a", "  a  b ", "<m>a", "a <m> b", "▁a", "   "):
            assert ids(made, text) == ours.encode(text).tolist(), (extra, text)
        assert made.decode(ids(made, "a ab")) == "a ab"


def test_a_model_of_words_is_refused():
    with pytest.raises(UserError, match="a sentencepiece model of type word has no tokenizer"):
        tokenizer_json(model("word", {"▁a": -1.0}))


def test_what_is_written(kinds, tmp_path):
    notes = export_tokenizer(
        kinds["unigram"], tmp_path, max_length=64, architecture="encoder", special={"mask_token": 4}
    )
    assert notes == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "maxpretrain_tokenizer.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    roles = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == roles
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "split_special_tokens": True,
    }
    assert (tmp_path / "tokenizer.model").read_bytes() == kinds["unigram"]._files()["tokenizer.model"]


def test_a_tokenizer_json_goes_through_as_it_is(kinds, tmp_path):
    export_tokenizer(kinds["huggingface"], tmp_path, max_length=64, architecture="decoder")
    assert (tmp_path / "tokenizer.json").read_bytes() == kinds["huggingface"]._files()["tokenizer.json"]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "split_special_tokens" not in config
    assert config["padding_side"] == "left"
    assert (config["eos_token"], config["pad_token"], config.get("bos_token")) == ("<|endoftext|>", "<pad>", None)


def test_a_model_type_whose_tokenizer_would_be_replaced(kinds, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    export_tokenizer(kinds["bpe"], tmp_path / "a", max_length=64, model_type="llama")
    assert not (tmp_path / "a" / "tokenization.py").exists()
    (tmp_path / "b" / "config.json").write_text('{"model_type": "qwen2"}')
    export_tokenizer(kinds["bpe"], tmp_path / "b", max_length=64)
    export_tokenizer(kinds["bpe"], tmp_path / "c", max_length=64, model_type="qwen2")
    for name in ("b", "c"):
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["auto_map"] == {"AutoTokenizer": [None, "tokenization.Tokenizer"]}
        assert "class Tokenizer(PreTrainedTokenizerFast)" in (tmp_path / name / "tokenization.py").read_text()


def test_roles_that_cannot_be(kinds, tmp_path):
    with pytest.raises(UserError, match="padding and end of sequence are the same id 2"):
        export_tokenizer(kinds["bpe"], tmp_path, max_length=64, special={"pad_token": 2})
    with pytest.raises(UserError, match="mask_token is id 420, which is not among the tokenizer's 420 ids"):
        export_tokenizer(kinds["bpe"], tmp_path, max_length=64, special={"mask_token": 420})
    assert list(tmp_path.iterdir()) == []


def test_other_ids_are_reported(tmp_path):
    # In float32 and in float64 the sum of two scores falls on different sides of the third.
    tie = model("unigram", {"▁": -4.0, "a": -3.1, "b": -3.3, "ab": -6.4})
    note = export_tokenizer(tie, tmp_path, max_length=64)
    assert note == [
        "the exported tokenizer.json makes other ids of 1 in 12 probe texts, such as "
        "'  two spaces, a tab\\tand\\n\\n  an indented line\\r\\n'"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again(kinds, kind, tmp_path):
    ours = kinds[kind]
    special = {} if ours.kind == "huggingface" else {"mask_token": 4}
    assert export_tokenizer(ours, tmp_path, max_length=64, architecture="decoder", special=special) == []
    back = import_tokenizer(tmp_path, rows=ours.vocab_size)
    assert type(back) is type(ours)
    assert back.fingerprint == ours.fingerprint
    # And by the files that others read.
    (tmp_path / "maxpretrain_tokenizer.json").unlink()
    back = import_tokenizer(tmp_path, rows=ours.vocab_size)
    assert isinstance(back, HuggingFace)
    assert (back.vocab_size, back.unk_id, back.bos_id, back.eos_id, back.pad_id) == (
        ours.vocab_size,
        ours.unk_id,
        ours.bos_id,
        ours.eos_id,
        ours.pad_id,
    )
    for text in (*HARD, *TEXTS[:3], *fuzz(100, seed=2)):
        expected = ours.encode(text).tolist()
        assert back.encode(text).tolist() == expected
        assert back.decode(expected) == text


def test_a_tokenizer_json_changed_since_is_the_one_that_counts(kinds, tmp_path):
    export_tokenizer(kinds["bpe"], tmp_path, max_length=64)
    data = (tmp_path / "tokenizer.json").read_text()
    made = tokenizers.Tokenizer.from_str(data)
    made.add_special_tokens(["<new>"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    assert import_tokenizer(tmp_path).vocab_size == 421
    (tmp_path / "tokenizer.json").unlink()
    assert import_tokenizer(tmp_path).fingerprint == kinds["bpe"].fingerprint


def published(directory, added=("<|endoftext|>", "<bos>", "<fill>"), **files):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    made.add_special_tokens(list(added))
    made.add_tokens(["plain"])
    (directory / "tokenizer.json").write_text(made.to_str())
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    tokenizer = import_tokenizer(directory)
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id


def test_special_ids_of_a_published_directory(tmp_path):
    assert published(tmp_path) == (4, 3, None)  # by their usual names
    stated = {"bos_token": None, "eos_token": {"content": "<fill>"}, "pad_token": "<|endoftext|>"}
    assert published(tmp_path, tokenizer_config=stated) == (None, 5, 3)
    assert published(tmp_path, tokenizer_config={"eos_token": "nowhere", "pad_token": "plain"}) == (4, 3, 6)
    assert published(tmp_path, tokenizer_config={"pad_token": "<|endoftext|>"}) == (4, 3, None)  # never eos
    assert published(tmp_path, tokenizer_config={}, special_tokens_map={"eos_token": {"content": "<fill>"}}) == (
        4,
        5,
        None,
    )
    assert published(
        tmp_path, tokenizer_config={"cls_token": "<fill>", "sep_token": "<bos>"}, special_tokens_map={}
    ) == (
        5,
        4,
        None,
    )


def test_special_ids_of_a_config_that_may_hold_defaults(tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": [5, 3], "pad_token_id": 4}
    assert published(tmp_path, config=ids) == (
        4,
        5,
        None if ids["pad_token_id"] == 5 else 4,
    )  # id 1 is an ordinary word
    stated = {"bos_token": "<fill>", "eos_token": "<|endoftext|>", "pad_token": None}
    assert published(tmp_path, config=ids, tokenizer_config=stated) == (5, 3, None)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "spm.model"])
def test_a_sentencepiece_model_alone(kinds, tmp_path, name):
    (tmp_path / name).write_bytes(kinds["bpe"]._files()["tokenizer.model"])
    assert import_tokenizer(tmp_path, rows=500).fingerprint == kinds["bpe"].fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<pad>", "eos_token": "<s>", "pad_token": "The"}')
    changed = import_tokenizer(tmp_path)
    assert (changed.bos_id, changed.eos_id, changed.pad_id) == (3, 1, 3)
    assert changed.encode(TEXTS[0]).tolist() == kinds["bpe"].encode(TEXTS[0]).tolist()


def test_bad_directories(kinds, tmp_path):
    assert import_tokenizer(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"only as vocab\.txt, which is not read"):
        import_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # what Llama 3 has under this name
    with pytest.raises(
        UserError, match=r"tokenizer\.model cannot be used: not a sentencepiece model; save the tokenizer"
    ):
        import_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be used: not a tokenizer\.json"):
        import_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(kinds["huggingface"]))
    with pytest.raises(UserError, match="has ids up to 399, but the model's embedding has 399 rows"):
        import_tokenizer(tmp_path, rows=399)
    assert import_tokenizer(tmp_path, rows=512).vocab_size == 400  # padded rows are common
    for text in ("[1]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=r"tokenizer_config\.json is"):
            import_tokenizer(tmp_path)


def test_generation_config(kinds):
    decoder, pair = ModelConfig(), ModelConfig(architecture="encoder-decoder", decoder_start_id=3)
    assert generation_config(kinds["bpe"], decoder) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert generation_config(kinds["huggingface"], pair) == {
        "eos_token_id": 0,
        "pad_token_id": 1,
        "decoder_start_token_id": 3,
    }
    assert generation_config(Bytes(), decoder) == generation_config(None, decoder) == {}


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["", "llama", "qwen2", "bert", "t5", "modernbert"])
def test_auto_tokenizer(kinds, kind, model_type, tmp_path):
    from transformers import AutoTokenizer

    ours = kinds[kind]
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    mask = ours.encode("<mask>").tolist() if "<mask>" in str(ours._files()) else []
    special = {"mask_token": mask[0]} if len(mask) == 1 else {}
    export_tokenizer(ours, tmp_path, max_length=64, special=special)
    for options in ({}, {"trust_remote_code": True}):
        theirs = AutoTokenizer.from_pretrained(tmp_path, **options)
        for text in (*HARD, *TEXTS[:20], *fuzz(300)):
            if kind == "huggingface" and "<pad>" in text:
                continue
            assert theirs(text, verbose=False)["input_ids"] == ours.encode(text).tolist(), text
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (
            ours.bos_id,
            ours.eos_id,
            ours.pad_id,
            ours.unk_id,
        )
        assert len(theirs) == ours.vocab_size
        assert theirs.model_max_length == 64
