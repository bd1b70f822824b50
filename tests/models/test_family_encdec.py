"""T5, mT5, UMT5 and BART beyond their goldens: what their files say and do not say, and decoding with a cache."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.convert.mapping import Mapping, as_tree
from maxpretrain.errors import UserError
from maxpretrain.models import build, families, parameter_count
from maxpretrain.models.families import bart, mt5, t5, umt5
from maxpretrain.models.families.options import Options

GOLDENS = Path(__file__).parents[1] / "golden" / "families"

T5 = {"vocab_size": 99, "d_model": 64, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 8, "model_type": "t5"}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "model_type": "bart",
}


def read(family, **keys):
    return family.from_options(Options((BART if family is bart else T5) | keys))


@functools.cache
def golden(name):
    """The arrays, the model and its parameters."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = dict(file)
    options = Options(json.loads(str(arrays["config"])))
    family = families.by_type(options.model_type)
    model = build(family.from_options(options))
    mapping = Mapping(model, family.names(model.config))
    made = mapping.load(lambda tensor: arrays[f"weights/{tensor}"], name)
    return arrays, model, as_tree({path: jnp.asarray(value) for path, value in made})


@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1", "umt5-wide", "bart-scaled"])
def test_token_by_token_equals_all_at_once(name):
    arrays, model, params = golden(name)
    tokens, decoder = jnp.asarray(arrays["ids"], jnp.int32), jnp.asarray(arrays["decoder_ids"], jnp.int32)
    mask = jnp.asarray(arrays["mask"], jnp.int32)
    rows, length = decoder.shape

    @jax.jit
    def begin(params):
        return model.empty_cache(rows, length + 4) | model.remember(params, model.encode(params, tokens, mask))

    @jax.jit
    def step(params, cache, token, at):
        return model.decode(params, token, jnp.broadcast_to(at, token.shape), cache, mask)

    def run(first):
        """The first so many tokens at one time, then one by one."""
        at = jnp.arange(first, dtype=jnp.int32)[None]
        hidden, cache = step(params, begin(params), decoder[:, :first], at)
        parts = [hidden]
        for i in range(first, length):
            hidden, cache = step(params, cache, decoder[:, i : i + 1], jnp.full((1, 1), i, jnp.int32))
            parts.append(hidden)
        return jnp.concatenate(parts, 1)

    whole = jax.jit(model.apply)(params, tokens, segments=mask, decoder_tokens=decoder)
    real = arrays["decoder_mask"].astype(bool)
    np.testing.assert_allclose(whole.hidden[real], arrays["hidden"][real], rtol=0, atol=2e-5)
    for first in (1, 7):
        np.testing.assert_allclose(run(first), whole.hidden, rtol=0, atol=2e-5)


def test_encoded_alone_as_with_padding():
    arrays, model, params = golden("umt5")
    tokens, mask = jnp.asarray(arrays["ids"], jnp.int32), jnp.asarray(arrays["mask"], jnp.int32)
    length = int(mask[1].sum())
    assert length < mask.shape[1]
    padded, alone = model.encode(params, tokens, mask), model.encode(params, tokens[1:, :length])
    np.testing.assert_allclose(padded[1:, :length], alone, rtol=0, atol=1e-5)


def test_published_sizes():
    config = families.preset("t5-v1.1-xl")
    assert (config.num_layers, config.model_dim, config.num_heads, config.head_width) == (24, 2048, 32, 64)
    assert (config.mlp_dim, config.vocab_size, config.activation, config.gated) == (5120, 32_128, "gelu_tanh", True)
    assert (config.tie_embeddings, config.logit_scale, config.attention_scale) == (False, 1.0, 1.0)
    config = families.preset("t5-11b")
    assert (config.model_dim, config.num_heads, config.head_width, config.mlp_dim) == (1024, 128, 128, 65_536)
    assert (config.tie_embeddings, config.logit_scale, config.activation) == (True, 1 / 32, "relu")
    config = families.preset("bart-large")
    assert (config.num_layers, config.decoder_layers, config.model_dim, config.num_heads) == (12, 12, 1024, 16)
    assert (config.position_offset, config.norm_placement, config.embed_norm, config.bias) == (2, "post", True, True)
    assert [families.preset(f"{name}-small").vocab_size for name in ("t5", "mt5", "umt5")] == [32_128, 250_112, 256_384]
    # of the published files, but for tables that are there twice
    counts = {"t5-large": 737_668_096, "t5-3b": 2_851_598_336, "mt5-small": 300_176_768, "bart-large": 406_291_456}
    assert {name: parameter_count(families.preset(name)) for name in counts} == counts


def test_all_presets_go_out_and_come_back():
    for family in (t5, mt5, umt5, bart):
        for name, config in family.PRESETS.items():
            back = family.from_options(Options(json.loads(json.dumps(family.to_options(config)))))
            assert back == config, name


def test_whether_t5_is_tied_and_scaled():
    assert (read(t5).tie_embeddings, read(t5).logit_scale) == (True, 1 / 8)
    published = read(t5, tie_word_embeddings=False)
    rewritten = read(t5, tie_word_embeddings=True, scale_decoder_outputs=False)
    assert published == rewritten
    assert (published.tie_embeddings, published.logit_scale) == (False, 1.0)
    apart = read(t5, tie_word_embeddings=False, scale_decoder_outputs=True)
    assert (apart.tie_embeddings, apart.logit_scale) == (False, 1 / 8)
    together = dataclasses.replace(published, tie_embeddings=True)
    for config in (read(t5), published, apart, together):
        assert read(t5, **t5.to_options(config)) == config
    for family in (mt5, umt5):
        config = dataclasses.replace(read(family), tie_embeddings=True)
        assert read(family, **family.to_options(config)) == config
    assert t5.to_options(published)["tie_word_embeddings"] is False
    assert [read(mt5, tie_word_embeddings=tied).logit_scale for tied in (True, False)] == [1.0, 1.0]
    assert [read(umt5, tie_word_embeddings=tied).logit_scale for tied in (True, False)] == [1 / 8, 1 / 8]


@pytest.mark.parametrize("family", [t5, mt5, umt5])
def test_the_tensors_decide_whether_there_is_an_unembedding(family):
    config, table = read(family), np.ones((99, 64), np.float32)
    tensors = {"shared.weight": table, "lm_head.weight": table.copy()}
    assert family.refined(config, tensors, tensors.__getitem__).tie_embeddings  # the same a second time
    tensors["lm_head.weight"][3, 5] = 2
    assert not family.refined(config, tensors, tensors.__getitem__).tie_embeddings
    del tensors["lm_head.weight"]
    assert family.refined(config, tensors, tensors.__getitem__).tie_embeddings


def test_a_bias_of_the_logits_of_bart_is_one_if_it_is_not_zero():
    tensors = {"final_logits_bias": np.zeros((1, 99), np.float32)}
    config = bart.refined(read(bart), tensors, tensors.__getitem__)
    assert not config.lm_bias
    assert not bart.refined(read(bart), {}, tensors.__getitem__).lm_bias
    assert not any(name.theirs == "final_logits_bias" for name in bart.names(config))
    assert not read(bart, **bart.to_options(config)).lm_bias
    tensors["final_logits_bias"][0, 7] = 0.5
    assert bart.refined(read(bart), tensors, tensors.__getitem__).lm_bias


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ("relu", False)),
        ({"feed_forward_proj": "gated-gelu"}, ("gelu_tanh", True)),
        ({"feed_forward_proj": "gelu"}, ("gelu", False)),
        ({"feed_forward_proj": "gated-silu"}, ("silu", True)),
        # as some published files of UMT5 have it
        ({"dense_act_fn": "gelu_new", "is_gated_act": True}, ("gelu_tanh", True)),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, ("gelu", True)),
    ],
)
def test_activations(keys, expected):
    config = read(t5, **keys)
    assert (config.activation, config.gated) == expected
    assert read(t5, **t5.to_options(config)) == config


def test_options_beyond_the_goldens_come_back():
    keys = {"num_decoder_layers": 5, "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40}
    config = read(umt5, **keys, decoder_start_token_id=3, dropout_rate=0.25, n_positions=2048)
    assert (config.decoder_layers, config.relative.buckets, config.relative.max_distance) == (5, 16, 40)
    assert (config.decoder_start_id, config.dropout, config.max_length, config.gated) == (3, 0.25, 2048, True)
    assert read(umt5, **umt5.to_options(config)) == config
    config = read(bart, encoder_layers=1, scale_embedding=True, activation_function="relu", attention_dropout=0.3)
    assert (config.num_layers, config.decoder_layers, config.embed_scale, config.dropout) == (1, 2, True, 0.3)
    assert config.activation == "relu"
    assert read(bart, **bart.to_options(config)) == config


def test_what_cannot_be_built_is_refused():
    for family, keys, message in (
        (bart, {"decoder_ffn_dim": 48}, "decoder_ffn_dim is 48, and only 40 is supported for bart"),
        (bart, {"decoder_attention_heads": 8}, "decoder_attention_heads is 8, and only 4 is supported for bart"),
        (bart, {"tie_word_embeddings": False}, "tie_word_embeddings is False, and only True is supported for bart"),
        (t5, {"is_encoder_decoder": False}, "is_encoder_decoder is False, and only True is supported for t5"),
        (t5, {"feed_forward_proj": "gated-mish"}, 'feed_forward_proj is "gated-mish", and supported are gelu'),
    ):
        with pytest.raises(UserError, match=message):
            read(family, **keys)


def test_what_cannot_be_exported_is_refused():
    scaled = dataclasses.replace(read(mt5), logit_scale=0.5)
    for family in (t5, mt5, umt5):
        with pytest.raises(UserError, match=r"model.logit_scale is 0.5, and files of this kind are read with"):
            family.to_options(scaled)
