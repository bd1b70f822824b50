"""Tokenizers: exact round trips, control pieces, fingerprints, and what they refuse."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import tokenizers

from maxpretrain.config import TokenizerConfig
from maxpretrain.data.tokenizer import Bytes, Characters, HuggingFace, SentencePiece, load_tokenizer, train_tokenizer
from maxpretrain.errors import UserError

TEXTS = [f"The quick brown fox jumps over the lazy dog.\n\n  And again it jumps, over {i} dogs.\n" for i in range(300)]
HARD = [
    *"ab c\n\t \r▁▅é😀\x01\u2028\ufffd\u0301\ufeff",
    "  ",
    "\n\n",
    "    ",
    "</s>",
    "<s>",
    "<unk>",
    "<0x41>",
    "The",
    "<tool>",
]


@pytest.fixture(scope="module")
def trained():
    def make(algorithm, vocab_size=320):
        return train_tokenizer(
            TokenizerConfig(algorithm=algorithm, vocab_size=vocab_size, user_symbols=("<tool>", "<a,b>")), TEXTS
        )

    return {name: make(name) for name in ("unigram", "bpe")}


def hugging_face(**special):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(4)  # as many published files have it
    tokenizer.enable_padding(length=8)
    return HuggingFace(tokenizer.to_str().encode(), special or None)


def every(trained):
    return [
        *trained.values(),
        hugging_face(),
        Bytes(("<tool>", "</s>")),
        Characters("".join(HARD), ("<tool>", "</s>", "<unk>")),
    ]


def test_decode_of_encode_is_the_text(trained):
    random.seed(0)
    samples = [
        "",
        " ",
        "\n",
        "  a\n\n\tb  \r\n",
        *("".join(random.choices(HARD, k=random.randrange(20))) for _ in range(300)),
    ]
    for tokenizer in every(trained):
        for text in samples:
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32
            assert tokenizer.decode(ids) == text, (tokenizer, text)
            assert "".join(tokenizer.stream(ids)) == text, (tokenizer, text)
        ids, lengths = tokenizer.encode_batch(samples, threads=2)
        assert ids.tolist() == [i for text in samples for i in tokenizer.encode(text).tolist()]
        assert lengths.tolist() == [len(tokenizer.encode(text)) for text in samples]


def test_control_pieces_never_come_from_text(trained):
    for tokenizer in every(trained):
        control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
        ids = tokenizer.encode(
            " ".join(c for c in HARD if c != "▁") + "<s></s><pad><|endoftext|>" * isinstance(tokenizer, SentencePiece)
        )
        assert not control & set(ids.tolist())
        assert tokenizer.eos_id is not None
        assert tokenizer.eos_id != tokenizer.pad_id
        assert tokenizer.decode([tokenizer.eos_id]) == ""


def test_sentencepiece_ids(trained):
    for tokenizer in trained.values():
        assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (
            0,
            1,
            2,
            3,
            320,
        )
        assert [tokenizer.piece(i) for i in (0, 1, 2, 3, 4, 5, 6)] == [
            "<unk>",
            "<s>",
            "</s>",
            "<pad>",
            "<tool>",
            "<a,b>",
            "<0x00>",
        ]
        assert tokenizer.encode("<tool><a,b>").tolist() == [4, 5]
        assert tokenizer.joins


def test_training_is_repeatable_and_fingerprinted(trained):
    for name, tokenizer in trained.items():
        again = train_tokenizer(
            TokenizerConfig(algorithm=name, vocab_size=320, user_symbols=("<tool>", "<a,b>")), iter(TEXTS)
        )
        assert again.fingerprint == tokenizer.fingerprint
    assert len({t.fingerprint for t in every(trained)}) == 5
    assert Bytes().fingerprint != Bytes(("<a>",)).fingerprint
    assert Characters("ab").fingerprint == Characters("ba").fingerprint != Characters("abc").fingerprint


@pytest.mark.parametrize(("algorithm", "most"), [("unigram", 335), ("bpe", 795)])
def test_vocabulary_larger_than_the_corpus_allows(algorithm, most):
    config = TokenizerConfig(algorithm=algorithm, vocab_size=4096, user_symbols=("<tool>", "<a,b>"))
    with pytest.raises(
        UserError,
        match=rf"tokenizer\.vocab_size 4096 is more than the corpus allows; use at most {most}, or give more text",
    ):
        train_tokenizer(config, TEXTS)
    config = TokenizerConfig(algorithm=algorithm, vocab_size=most, user_symbols=("<tool>", "<a,b>"))
    assert train_tokenizer(config, TEXTS).vocab_size == most  # the number named would do


def test_vocabulary_too_small():
    with pytest.raises(
        UserError,
        match=r"tokenizer\.vocab_size 100 is too small for the corpus's characters and 256 bytes; use at least 302",
    ):
        train_tokenizer(TokenizerConfig(vocab_size=100), TEXTS)
    assert train_tokenizer(TokenizerConfig(vocab_size=302), TEXTS).vocab_size == 302


def test_nothing_to_train_on():
    for kind in ("sentencepiece", "characters"):
        with pytest.raises(UserError, match="the corpus holds no text"):
            train_tokenizer(TokenizerConfig(kind=kind), [])
    with pytest.raises(UserError, match=r"set tokenizer\.path"):
        train_tokenizer(TokenizerConfig(kind="huggingface"), TEXTS)


def test_save_load_pickle(trained, tmp_path):
    for i, tokenizer in enumerate(every(trained)):
        tokenizer.save(tmp_path / str(i))
        for copy in (load_tokenizer(tmp_path / str(i), tokenizer.kind), pickle.loads(pickle.dumps(tokenizer))):
            assert type(copy) is type(tokenizer)
            assert copy.fingerprint == tokenizer.fingerprint
            assert (copy.vocab_size, copy.eos_id, copy.pad_id) == (
                tokenizer.vocab_size,
                tokenizer.eos_id,
                tokenizer.pad_id,
            )
            assert copy.encode("The fox\n").tolist() == tokenizer.encode("The fox\n").tolist()


def test_load_a_model_and_a_tokenizer_json_by_path(trained, tmp_path):
    trained["bpe"].save(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a" / "tokenizer.model").fingerprint == trained["bpe"].fingerprint
    hugging_face().save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b" / "tokenizer.json").fingerprint == hugging_face().fingerprint
    (tmp_path / "b" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<pad>"}, "pad_token": "<pad>"}')
    changed = load_tokenizer(tmp_path / "b" / "tokenizer.json")
    assert (changed.eos_id, changed.pad_id) == (1, None)  # pad is never eos
    assert changed.fingerprint != hugging_face().fingerprint


def test_a_changed_or_unusable_file_is_refused(trained, tmp_path):
    trained["bpe"].save(tmp_path / "a")
    trained["unigram"].save(tmp_path / "b")
    (tmp_path / "a" / "tokenizer.model").write_bytes((tmp_path / "b" / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="was changed after it was saved"):
        load_tokenizer(tmp_path / "a")
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"x\.model cannot be used: not a sentencepiece model"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "x.json").write_bytes(b'{"model": 1}')
    with pytest.raises(UserError, match=r"x\.json cannot be used: not a tokenizer\.json"):
        load_tokenizer(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"nowhere\.model not found; check tokenizer\.path"):
        load_tokenizer(tmp_path / "nowhere.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(UserError, match=r'is a sentencepiece tokenizer, but tokenizer\.kind is "huggingface"'):
        load_tokenizer(tmp_path / "b", "huggingface")


def test_a_model_with_other_normalization_decodes_its_own_way():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePiece(model.getvalue())
    assert tokenizer.decode(tokenizer.encode("The quick")) == "The quick"  # without the space that it puts in front
    assert not tokenizer.joins
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, None)


def test_bytes():
    tokenizer = Bytes()
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (256, None, None, None)
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert Bytes(("<x>",)).encode("a<x>b").tolist() == [97, 256, 98]


def test_characters():
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), ["hello\n", "wörld"])
    assert tokenizer.characters == "\ndehlorwö"
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.unk_id) == (9, None, None)
    assert tokenizer.encode("hello").tolist() == [3, 2, 4, 4, 5]
    for text, name in (("hex", r"'x' \(U\+0078\)"), ("h😀", r"'😀' \(U\+1F600\)")):
        with pytest.raises(UserError, match=rf"the character {name} is not among the 9 characters"):
            tokenizer.encode(text)
    assert Characters("ab", ("<unk>",)).encode("axb").tolist() == [0, 2, 1]
    with pytest.raises(UserError, match="must be distinct"):
        Characters("ab", ("<x>", "<x>"))
