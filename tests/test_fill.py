"""Filling masks, against the network run on each text alone, by token ids that a tokenizer spells out."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import MeshConfig, ModelConfig
from maxpretrain.data.tokenizer import Bytes, Characters, HuggingFace
from maxpretrain.errors import Diverged, UserError
from maxpretrain.fill import Candidate, FillMask
from maxpretrain.mesh import make_layout
from maxpretrain.models import build
from maxpretrain.nn.base import is_spec
from maxpretrain.objectives import ELECTRA

# 27 letters, then <s> 27, </s> 28, <pad> 29, [MASK] 30; and rows of the embedding beyond them.
LETTERS = Characters("abcdefghijklmnopqrstuvwxyz ", ["<s>", "</s>", "<pad>", "[MASK]"])
CONFIG = ModelConfig(
    architecture="encoder",
    vocab_size=36,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    max_length=24,
    norm_placement="post",
    embed_norm=True,
    lm_transform=True,
    lm_bias=True,
)
TEXTS = ["the [MASK]at", "a [MASK][MASK] sat on [MASK]", "[MASK]"]


@functools.cache
def setup():
    model = build(CONFIG)
    rng = np.random.default_rng(3)

    def leaf(spec):
        return jnp.asarray((spec.role == "norm") + 0.5 * rng.standard_normal(spec.shape), jnp.float32)

    return model, jax.tree.map(leaf, model.abstract, is_leaf=is_spec), FillMask(model, LETTERS)


def alone(text):
    """Probabilities [N, 31] for the masks of one text, without padding."""
    model, params, _ = setup()
    ids = np.concatenate([[27], LETTERS.encode(text), [28]]).astype(np.int32)
    run = jax.jit(lambda tokens: model.logits(params, model.apply(params, tokens).hidden))
    logits = np.asarray(run(ids[None]))[0, ids == 30, :31]
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_candidates_are_those_of_each_text_alone():
    _, params, fill = setup()
    assert (fill.mask, fill.mask_id) == ("[MASK]", 30)
    found = fill(params, TEXTS, top_k=4)
    assert [len(masks) for masks in found] == [1, 3, 1]
    for text, masks in zip(TEXTS, found, strict=True):
        for expected, candidates in zip(alone(text), masks, strict=True):
            assert [one.id for one in candidates] == np.argsort(-expected)[:4].tolist()
            np.testing.assert_allclose([one.probability for one in candidates], -np.sort(-expected)[:4], rtol=1e-4)
    (everything,) = fill(params, TEXTS[:1], top_k=100)[0]
    assert len(everything) == 31
    assert sum(one.probability for one in everything) == pytest.approx(1.0, rel=1e-5)
    assert next(one for one in everything if one.id == 1) == Candidate(
        1, "a", pytest.approx(alone(TEXTS[0])[0, 1], rel=1e-4)
    )
    assert next(one.text for one in everything if one.id == 28) == "</s>"  # what adds nothing goes by its name
    assert fill(params, []) == []


def test_filled_texts():
    _, params, fill = setup()
    likeliest = [[masks[0].text for masks in text] for text in fill(params, TEXTS, top_k=1)]
    expected = []
    for text, letters in zip(TEXTS, likeliest, strict=True):
        for letter in letters:
            text = text.replace("[MASK]", letter if len(letter) == 1 else "", 1)
        expected.append(text)
    assert fill.filled(params, TEXTS) == expected
    drawn = [fill.filled(params, TEXTS, temperature=5.0, top_k=25, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(texts) for texts in drawn}) == 3
    assert fill.filled(params, TEXTS, temperature=3.0, top_k=1) == expected
    assert fill.filled(params, []) == []


def test_texts_that_cannot_be_filled():
    _, params, fill = setup()
    with pytest.raises(UserError, match=r'"the cat" has no mask; write \[MASK\] where a token is to be filled in'):
        fill(params, ["[MASK]", "the cat"])
    with pytest.raises(UserError, match=r'"a{39}…" has no mask'):
        fill.filled(params, ["a" * 50])
    with pytest.raises(UserError, match="a text has 25 tokens, and the model positions for 24; shorten it"):
        fill(params, ["a" * 22 + "[MASK]"])
    assert len(fill(params, ["a" * 21 + "[MASK]"])) == 1
    with pytest.raises(UserError, match="top_k is 0; it must be at least 1"):
        fill(params, TEXTS, top_k=0)
    broken = params | {"lm": params["lm"] | {"bias": params["lm"]["bias"] * jnp.nan}}
    with pytest.raises(Diverged, match="the model's logits for the masks of text 0 are not finite"):
        fill(broken, TEXTS)


def test_networks_and_tokenizers_that_cannot_fill():
    with pytest.raises(
        UserError, match=r"the characters tokenizer has no mask .*; a run whose objective masks trains one"
    ):
        FillMask(build(CONFIG), Characters("abc"))
    with pytest.raises(UserError, match="the tokenizer has 257 ids, but the model only 36"):
        FillMask(build(CONFIG), Bytes(["<mask>"]))
    with pytest.raises(UserError, match=r"masks are filled by an encoder, and model.architecture is decoder"):
        FillMask(build(dataclasses.replace(CONFIG, architecture="decoder")), LETTERS)
    with pytest.raises(UserError, match=r'model.heads are replaced; without "lm" there is nothing to fill masks with'):
        FillMask(build(dataclasses.replace(CONFIG, heads=("replaced",), lm_transform=False)), LETTERS)


def test_of_an_electra_the_generator_fills():
    """The discriminator says of each token whether it was replaced, and has no words of its own."""
    discriminator = dataclasses.replace(CONFIG, heads=("replaced",), lm_transform=False, lm_bias=False)
    for sharing in ("shared", "disentangled"):
        model = ELECTRA(generator_share=0.5, sharing=sharing).build(discriminator)
        rng = np.random.default_rng(4)
        draw = lambda s: jnp.asarray((s.role == "norm") + 0.5 * rng.standard_normal(s.shape), jnp.float32)  # noqa: E731, B023
        params = jax.tree.map(draw, model.abstract, is_leaf=is_spec)
        own, generator = model.generator_params(params), build(model.generator.config)
        assert generator.config.model_dim == 8
        answers = FillMask(model, LETTERS)(params, TEXTS[1:2], 3)
        assert answers == FillMask(generator, LETTERS)(own, TEXTS[1:2], 3)
        assert len(answers[0]) == 3


def test_parameters_spread_over_a_mesh():
    model, params, fill = setup()
    layout = make_layout(MeshConfig(data=2, fsdp=4))
    spread = jax.device_put(params, layout.param_shardings(model.abstract))
    assert fill.filled(spread, TEXTS) == fill.filled(params, TEXTS)


def published(mask, **how):
    """A tokenizer.json of words, with ends of a text and a mask among its special tokens."""
    import tokenizers

    words = {
        word: i
        for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", mask, "the", "cat", "sat", "[", "]", "mask", "<", ">"])
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", tokenizers.AddedToken(mask, special=True, **how)])
    return HuggingFace(tokenizer.to_str().encode())


@pytest.mark.parametrize("mask", ["[MASK]", "<mask>"])
def test_masks_of_published_tokenizers(mask):
    tokenizer = published(mask, lstrip=True)
    fill = FillMask(build(CONFIG), tokenizer)
    assert fill._ids(f"The {mask} sat {mask}").tolist() == [1, 4, 3, 6, 3, 2]
    assert 3 not in tokenizer.encode(f"the {mask}")  # elsewhere it is plain text
    assert [one.text for one in fill(setup()[1], [f"the {mask}"], top_k=12)[0][0] if one.id in (3, 5)] in (
        [mask, "cat"],
        ["cat", mask],
    )


class Plain(Characters):
    """Takes a mask for plain text."""

    def encode_marked(self, text):
        return super().encode(text.replace("[MASK]", "mask"))


def test_a_mask_that_the_tokenizer_does_not_see_in_a_text():
    fill = FillMask(build(CONFIG), Plain(LETTERS.characters, LETTERS.symbols))
    assert fill._ids("a[MASK]b[MASK]").tolist() == setup()[2]._ids("a[MASK]b[MASK]").tolist() == [27, 1, 30, 2, 30, 28]
