"""Decoders without experts, where the goldens do not reach: PaLM by its formula, sizes, published config.json, refusals."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest

from maxpretrain.errors import UserError
from maxpretrain.models import build, families, parameter_count
from maxpretrain.models.families.options import Options
from maxpretrain.nn.base import is_spec

DENSE = ("qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2", "gpt_neox", "bloom", "palm")
PALM = dataclasses.replace(
    families.preset("palm-8b"),
    vocab_size=99,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    head_dim=12,
    mlp_dim=128,
    logit_scale=1 / math.sqrt(32),
)


def palm(params, tokens):
    """float64 logits [T, V] of one sequence, written from the paper: y = x + MLP(LN(x)) + attention(LN(x))."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    table, block = params["embed"]["table"], params["decoder"]["stack"]["block"]
    length, width = len(tokens), 12
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)

    def layer_norm(x, scale):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale

    def rotate(x):  # [..., T, K]
        pairs = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], -1)

    x = table[tokens]
    for i in range(2):
        layer = jax.tree.map(lambda a: a[i], block)  # noqa: B023
        n = layer_norm(x, layer["attention_norm"]["scale"])
        attention, mlp = layer["attention"], layer["mlp"]
        query = rotate(np.einsum("td,dhk->htk", n, attention["query"]["kernel"]))
        key = rotate(n @ attention["key"]["kernel"][:, 0])  # one for all heads, as the values
        scores = np.einsum("htk,sk->hts", query, key) / math.sqrt(width)
        scores = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
        weights = scores / scores.sum(-1, keepdims=True)
        seen = np.einsum("hts,sk->htk", weights, n @ attention["value"]["kernel"][:, 0])
        gate = n @ mlp["gate"]["kernel"]
        hidden = gate / (1 + np.exp(-gate)) * (n @ mlp["up"]["kernel"])
        x = x + hidden @ mlp["down"]["kernel"] + np.einsum("htk,hkd->td", seen, attention["out"]["kernel"])
    return layer_norm(x, params["decoder"]["norm"]["scale"]) / math.sqrt(32) @ table.T


def test_palm_is_its_formula():
    model, rng = build(PALM), np.random.default_rng(0)
    draw = lambda spec: rng.normal(spec.role == "norm", 0.2, spec.shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, model.abstract, is_leaf=is_spec)
    tokens = rng.integers(0, 99, (1, 52)).astype(np.int32)
    logits = jax.jit(lambda p, t: model.logits(p, model.apply(p, t).hidden))(params, tokens)
    np.testing.assert_allclose(logits[0], palm(params, tokens[0]), rtol=0, atol=2e-5)
    assert {a.shape for a in jax.tree.leaves(params["decoder"]["stack"]["block"]["attention"])} == {
        (2, 32, 4, 12),  # queries
        (2, 32, 1, 12),  # the one key and value
        (2, 4, 12, 32),
    }
    assert "bias" not in str(jax.tree_util.tree_structure(params))


def test_palm_begins_as_published():
    config = dataclasses.replace(PALM, model_dim=128, head_dim=64, mlp_dim=512)
    abstract = build(config).abstract
    block, key = abstract["decoder"]["stack"]["block"], jax.random.key(0)
    assert np.std(abstract["embed"]["table"].init(key, (99, 128))) == pytest.approx(1.0, rel=0.02)
    query, out, down = (
        block[a][b]["kernel"] for a, b in (("attention", "query"), ("attention", "out"), ("mlp", "down"))
    )
    for spec, inputs in ((query, 128), (out, 256), (down, 512)):
        assert np.std(spec.init(key, spec.shape[1:])) == pytest.approx(inputs**-0.5, rel=0.02), inputs


COUNTS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mistral-large-123b": 122_610_069_504,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "olmo2-1b": 1_484_916_736,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "pythia-14m": 14_067_712,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "palm-8b": 8_632_012_800,  # 8.63 billion in the paper
    "palm-62b": 62_495_662_080,  # 62.50
    "palm-540b": 540_356_474_880,  # 540.35
}


def test_numbers_of_parameters():
    assert {name: parameter_count(families.preset(name)) for name in COUNTS} == COUNTS


# What a config.json says of the network, in the spelling of its time.
PUBLISHED = {
    "qwen2.5-14b": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 13_824,
        "max_position_embeddings": 131_072,
        "max_window_layers": 48,
        "num_attention_heads": 40,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "sliding_window": 131_072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152_064,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "max_position_embeddings": 40_960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151_936,
    },
    "mistral-7b-v0.1": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "max_position_embeddings": 32_768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32_000,
    },
    "gemma-2-27b": {
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36_864,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "vocab_size": 256_000,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32_768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262_144,
    },
    "olmo2-7b": {
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500_000,
        "tie_word_embeddings": False,
        "vocab_size": 100_352,
    },
    "pythia-6.9b": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 4096,
        "intermediate_size": 16_384,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_emb_base": 10_000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50_432,
    },
    "bloom-176b": {
        "model_type": "bloom",
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.0048,
        "layer_norm_epsilon": 1e-5,
        "n_embed": 14_336,
        "n_layer": 70,
        "num_attention_heads": 112,
        "seq_length": 2048,
        "slow_but_exact": False,
        "vocab_size": 250_880,
    },
}


def read(raw):
    return families.by_type(raw["model_type"]).from_options(Options(raw))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_preset(name):
    assert read(PUBLISHED[name]) == families.preset(name)


NEW = {"rope_parameters", "layer_types"}
OLD = {"rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"}


@pytest.mark.parametrize("family", [name for name in DENSE if name != "palm"])
def test_either_spelling_of_an_export_is_enough(family):
    module = families.FAMILIES[family]
    for name, config in module.PRESETS.items():
        raw = json.loads(json.dumps(module.to_options(config))) | {"model_type": module.MODEL_TYPE}
        for dropped in (NEW, OLD):
            kept = {key: value for key, value in raw.items() if key not in dropped}
            back = dataclasses.replace(read(kept), depth_scaled_init=config.depth_scaled_init)
            assert back == config, (name, dropped)


def test_windows_of_qwen():
    raw = PUBLISHED["qwen2.5-14b"] | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8}
    above = read(raw | {"max_window_layers": 1})
    assert (above.window, above.layer_pattern) == (8, ("global", "local", "local", "local"))
    written = families.FAMILIES["qwen2"].to_options(above)
    assert written["max_window_layers"] == 1
    assert written["layer_types"] == ["full_attention"] + 3 * ["sliding_attention"]
    everywhere = read(raw | {"max_window_layers": 0})
    assert (everywhere.window, everywhere.layer_pattern) == (8, ())
    assert read(raw | {"max_window_layers": 4}).window is None
    assert read(raw | {"sliding_window": None, "max_window_layers": 0}).window is None
    listed = read(raw | {"layer_types": ["sliding_attention", "full_attention"] * 2})
    assert listed.layer_pattern == ("local", "global")


def test_what_gemma_leaves_out_of_its_config():
    raw = PUBLISHED["gemma-3-1b"] | {"num_hidden_layers": 7}
    short = read({k: v for k, v in raw.items() if not k.startswith(("rope", "sliding"))})
    assert (short.rope.theta, short.rope.local_theta, short.window) == (1e6, 1e4, 4096)
    assert [short.is_local(i) for i in range(7)] == [True] * 5 + [False, True]
    plain = read(PUBLISHED["gemma-2-27b"] | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (plain.attention_softcap, plain.logit_softcap) == (None, None)
    assert read(PUBLISHED["gemma-2-27b"]).attention_scale == pytest.approx(1 / 12)


REFUSED = [
    ("gemma-2-27b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, and only False"),
    ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, and only its absence"),
    ("gemma-3-1b", {"hidden_activation": "quick_gelu"}, 'hidden_activation is "quick_gelu"'),
    ("qwen2.5-14b", {"is_causal": False}, "is_causal is False, and only True is supported for qwen2"),
    (
        "qwen3-8b",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"]},
        "layer_types",
    ),
    ("olmo2-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for olmo2"),
    ("mistral-7b-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types is"),
    ("pythia-6.9b", {"rotary_pct": 0.26}, "rotary_pct 0.26 turns 33 of a head; only even numbers are"),
    ("bloom-176b", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
]


@pytest.mark.parametrize(("name", "changed", "sentence"), REFUSED, ids=[str(case[1])[:40] for case in REFUSED])
def test_options_that_are_not_built_are_refused(name, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        read(PUBLISHED[name] | changed)


def test_shapes_that_no_config_json_can_say_are_refused():
    with pytest.raises(UserError, match="mlp_dim is 100, and BLOOM's is always 4 × model_dim 1024"):
        families.FAMILIES["bloom"].to_options(dataclasses.replace(families.preset("bloom-560m"), mlp_dim=100))
    with pytest.raises(UserError, match=r"attention_scale 0\.3 is no 1/√n of a whole n"):
        families.FAMILIES["gemma2"].to_options(dataclasses.replace(families.preset("gemma-2-2b"), attention_scale=0.3))


def test_names_that_are_read_over():
    ignored = families.FAMILIES["gpt_neox"].IGNORED

    def is_ignored(name):
        return any(re.search(pattern, name) for pattern in ignored)

    assert is_ignored("gpt_neox.layers.3.attention.bias")
    assert is_ignored("gpt_neox.layers.3.attention.masked_bias")
    assert not is_ignored("gpt_neox.layers.3.attention.dense.bias")
    assert not is_ignored("gpt_neox.layers.3.attention.query_key_value.bias")


def test_one_table_serves_where_it_is_tied():
    tied = dataclasses.replace(families.preset("pythia-14m"), tie_embeddings=True)
    names = [n.theirs for n in families.FAMILIES["gpt_neox"].names(tied)]
    assert "embed_out.weight" not in names
    untied = dataclasses.replace(families.preset("bloom-560m"), tie_embeddings=False)
    assert "lm_head.weight" in [n.theirs for n in families.FAMILIES["bloom"].names(untied)]
