"""Texts with sentinels, filled by what an encoder-decoder answers."""

from __future__ import annotations

import pydoc_data.topics
from types import SimpleNamespace

import numpy as np

from maxpretrain.config import TokenizerConfig
from maxpretrain.data.tokenizer import Bytes, train_tokenizer
from maxpretrain.infill import has_sentinels, said, spans_of
from maxpretrain.objectives.base import Reading
from maxpretrain.vocabulary import sentinels

PLAIN = Bytes(("</s>",), sentinels(3))


class Answering:
    """A generator that always says the same ids."""

    def __init__(self, tokenizer, text):
        self.tokenizer = tokenizer
        self.ids = tokenizer.encode_marked(text).tolist()

    def rows(self, params, prompts, **how):
        return [SimpleNamespace(made=self.ids, text="more")] * len(prompts)

    def reading(self, prompt):
        return Reading(answers=True)


def test_each_sentinel_becomes_its_span():
    generator = Answering(PLAIN, "lost<extra_id_0>cat<extra_id_1>the mat<extra_id_0>again")
    texts = said(generator, {}, ["A <extra_id_0> on <extra_id_1>.", "<extra_id_2>, <extra_id_1>", "No sentinel"])
    assert texts == ["A cat on the mat.", "<extra_id_2>, the mat", "more"]


def test_words_bring_their_space():
    config = TokenizerConfig(vocab_size=830, control_symbols=sentinels(2))
    tokenizer = train_tokenizer(config, pydoc_data.topics.topics.values())
    assert tokenizer.spaces_lead
    assert not PLAIN.spaces_lead
    assert tokenizer.encode_marked("The <extra_id_0> sat").tolist() == [
        *tokenizer.encode("The").tolist(), 829, *tokenizer.encode(" sat").tolist(),
    ]  # fmt: skip
    generator = Answering(tokenizer, "<extra_id_0> cat")
    assert said(generator, {}, ["The <extra_id_0> sat on <extra_id_1>."]) == ["The cat sat on <extra_id_1>."]


def test_what_counts_as_a_sentinel():
    assert has_sentinels("a <extra_id_2>", PLAIN)
    assert not has_sentinels("a <extra_id_3> <mask>", PLAIN)
    ids = np.array([256 + 3, 97, 256 + 3, 98])
    assert spans_of(ids.tolist(), {259: "<extra_id_0>"}, PLAIN) == {"<extra_id_0>": "a"}
