"""Special tokens by what they are for, in every kind of tokenizer; control symbols, which no text has."""

from __future__ import annotations

import dataclasses
import pydoc_data.topics

import numpy as np
import pytest

from maxpretrain.config import DataConfig, Run, TokenizerConfig
from maxpretrain.data.prepare import prepare
from maxpretrain.data.tokenizer import Bytes, load_tokenizer, train_tokenizer
from maxpretrain.errors import UserError
from maxpretrain.objectives import CLM
from maxpretrain.vocabulary import Vocabulary, sentinels

CONTROLS = ("<mask>", "[NLU]", *sentinels(3))
TEXTS = list(pydoc_data.topics.topics.values())


@pytest.fixture(scope="module")
def pieces():
    return train_tokenizer(TokenizerConfig(vocab_size=830, control_symbols=CONTROLS), TEXTS)


def test_control_symbols_are_the_last_ids_and_in_no_text(pieces):
    assert pieces.vocab_size == 830
    assert [pieces.piece(i) for i in range(825, 830)] == [
        "<mask>", "[NLU]", "<extra_id_2>", "<extra_id_1>", "<extra_id_0>",
    ]  # fmt: skip
    text = "a <mask> and <extra_id_0>."
    assert pieces.decode(pieces.encode(text)) == text
    assert max(pieces.encode(text)) < 825
    marked = pieces.encode_marked(text).tolist()
    assert marked.count(825) == 1
    assert marked.count(829) == 1
    # Control pieces have no text, and the space before one is the hidden word's.
    assert pieces.decode(marked) == "a and."


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_plain_tokenizers_have_them_too(kind, tmp_path):
    config = TokenizerConfig(kind=kind, user_symbols=("</s>", "<x>"), control_symbols=CONTROLS)
    made = train_tokenizer(config, ["abc <x>&<mask>[NLU]extra_id_0/s"])
    assert made.id_of("<extra_id_0>") == made.vocab_size - 1
    assert made.id_of("<mask>") == made.vocab_size - 5
    assert made.encode("<x>").tolist() == [made.id_of("<x>")]
    assert len(made.encode("<mask>")) == 6
    assert made.encode_marked("a<mask>").tolist()[1:] == [made.id_of("<mask>")]
    made.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.named == made.named
    assert again.fingerprint == made.fingerprint
    assert dataclasses.replace(Vocabulary.of(again), tokenizer=None).sentinels == tuple(
        made.vocab_size - 1 - i for i in range(3)
    )


def test_tokenizers_without_control_symbols_are_what_they_were():
    assert Bytes(("</s>",)).fingerprint == Bytes(("</s>",), ()).fingerprint


def test_the_roles_are_found_by_name(pieces):
    vocabulary = Vocabulary.of(pieces)
    assert vocabulary.size == 830
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (1, 2, 3)
    assert vocabulary.mask_id == 825
    assert vocabulary.sentinels == (829, 828, 827)
    assert vocabulary.modes == ()  # one of three is none
    assert vocabulary.fim == ()
    assert vocabulary.specials == (0, 1, 2, 3, 825, 826, 827, 828, 829)
    assert not set(vocabulary.specials) & set(vocabulary.ordinary.tolist())
    assert len(vocabulary.ordinary) == 821


def test_words_begin_at_white_space_and_sentences_end(pieces):
    vocabulary = Vocabulary.of(pieces)
    ids = pieces.encode("The cats sat. It was.\nYes")
    words = []
    for id, begins in zip(ids.tolist(), vocabulary.begins_word(ids), strict=True):
        if begins:
            words.append("")
        words[-1] += pieces.decode([id])
    assert [word.strip() for word in words if word.strip()] == ["The", "cats", "sat.", "It", "was.", "Yes"]
    ends = "".join(pieces.decode([i]) + ("|" if vocabulary.sentence_ends[i] else "") for i in ids.tolist())
    assert ends.replace("\n|", "|\n").replace("||", "|").startswith("The cats sat.| It was.|")


def test_word_pieces_mark_what_continues_a_word():
    tokenizers = pytest.importorskip("tokenizers")
    from maxpretrain.data.tokenizer import HuggingFace

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "cat", "##s", "."]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(names[:5])
    vocabulary = Vocabulary.of(HuggingFace(made.to_str().encode()))
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.mask_id) == (2, 3, 0, 4)
    assert vocabulary.specials == (0, 1, 2, 3, 4)
    ids = np.array([2, 5, 6, 7, 8, 9, 3])
    assert vocabulary.begins_word(ids).tolist() == [True, True, False, True, False, True, True]
    assert vocabulary.sentence_ends[9]


def test_a_control_symbol_that_is_a_piece_is_refused():
    config = TokenizerConfig(vocab_size=830, user_symbols=("<mask>",), control_symbols=("<mask>",))
    with pytest.raises(UserError, match='the control symbol "<mask>" is a piece of the vocabulary already'):
        train_tokenizer(config, TEXTS)
    with pytest.raises(
        UserError, match=r"tokenizer.vocab_size 100 is too small .* and 100 control symbols; use at least 4[0-9][0-9]"
    ):
        train_tokenizer(TokenizerConfig(vocab_size=100, control_symbols=sentinels(100)), TEXTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked(CLM):
    def symbols(self):
        return ("<mask>", *sentinels(2))


def test_a_trained_tokenizer_has_what_the_objective_needs(tmp_path):
    (tmp_path / "a.txt").write_text("".join(TEXTS)[:50_000])
    data = DataConfig(train=(str(tmp_path / "a.txt"),), split="tail", cache=str(tmp_path / "cache"), workers=1)
    run = Run(tokenizer=TokenizerConfig(kind="bytes", control_symbols=("<mask>", "<more>")), data=data)
    named = prepare(run.replace(objective=Marked())).tokenizer.named
    assert named == {"<mask>": 256, "<more>": 257, "<extra_id_1>": 258, "<extra_id_0>": 259}
    assert prepare(run).tokenizer.named == {"<mask>": 256, "<more>": 257}
