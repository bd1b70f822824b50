"""The families of encoders: published config.json files, what is refused, packing, token types, shared layers, old names."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.convert.mapping import Mapping
from maxpretrain.errors import UserError
from maxpretrain.fingerprint import named_leaves
from maxpretrain.models import build, families, parameter_count
from maxpretrain.models.families.options import Options
from maxpretrain.nn.base import is_spec

BERT = {"model_type": "bert", "vocab_size": 99, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
BERT |= {"intermediate_size": 40, "max_position_embeddings": 64, "initializer_range": 0.2}
DISTILBERT = {"model_type": "distilbert", "vocab_size": 99, "n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 40}
DEBERTA = BERT | {"model_type": "deberta-v2", "relative_attention": True, "pos_att_type": "p2c|c2p"}
DEBERTA |= {"position_buckets": 8, "max_relative_positions": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
MODERNBERT = BERT | {"model_type": "modernbert", "num_hidden_layers": 4, "local_attention": 6}
ALBERT = BERT | {"model_type": "albert", "embedding_size": 16}


def tiny(raw, **changes):
    """A config by its config.json, without dropout."""
    config = families.by_type(raw["model_type"]).from_options(Options(raw | changes))
    return dataclasses.replace(config, dropout=0.0)


def drawn(model):
    """Parameters of some size, norms around 1."""
    rng = np.random.default_rng(0)

    def draw(path, spec):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.2 * rng.standard_normal(spec.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.abstract, is_leaf=is_spec)


# Published config.json files, in the spelling of their time

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_BASE |= {"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_BASE |= {"initializer_range": 0.02, "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "type_vocab_size": 2}
PUBLISHED = {
    "bert-base": {
        **_BASE,
        "architectures": ["BertForMaskedLM"],
        "gradient_checkpointing": False,
        "model_type": "bert",
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "use_cache": True,
        "vocab_size": 30522,
    },
    "distilbert-base": {
        "activation": "gelu",
        "attention_dropout": 0.1,
        "dim": 768,
        "dropout": 0.1,
        "hidden_dim": 3072,
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "model_type": "distilbert",
        "n_heads": 12,
        "n_layers": 6,
        "pad_token_id": 0,
        "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "sinusoidal_pos_embds": False,
        "tie_weights_": True,
        "vocab_size": 30522,
    },
    "roberta-base": {
        **_BASE,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "model_type": "roberta",
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": 50265,
    },
    "albert-base-v2": {
        **_BASE,
        "attention_probs_dropout_prob": 0,
        "classifier_dropout_prob": 0.1,
        "down_scale_factor": 1,
        "embedding_size": 128,
        "gap_size": 0,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0,
        "inner_group_num": 1,
        "model_type": "albert",
        "net_structure_type": 0,
        "num_hidden_groups": 1,
        "num_memory_blocks": 0,
        "vocab_size": 30000,
    },
    "electra-base": {**_BASE, "embedding_size": 768, "model_type": "electra", "vocab_size": 30522},
    "electra-base-generator": {
        **_BASE,
        "embedding_size": 768,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "model_type": "electra",
        "num_attention_heads": 4,
        "vocab_size": 30522,
    },
    "deberta-v3-base": {
        **_BASE,
        "layer_norm_eps": 1e-7,
        "max_relative_positions": -1,
        "model_type": "deberta-v2",
        "norm_rel_ebd": "layer_norm",
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "position_buckets": 256,
        "relative_attention": True,
        "share_att_key": True,
        "type_vocab_size": 0,
        "vocab_size": 128100,
    },
    "modernbert-base": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "decoder_bias": True,
        "embedding_dropout": 0.0,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "hidden_activation": "gelu",
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 1152,
        "layer_norm_eps": 1e-05,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 12,
        "num_hidden_layers": 22,
        "position_embedding_type": "absolute",
        "vocab_size": 50368,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_preset(name):
    raw, preset = PUBLISHED[name], families.preset(name)
    config = families.by_type(raw["model_type"]).from_options(Options(raw))
    assert dataclasses.replace(config, heads=preset.heads) == preset


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("bert-tiny", 4_433_468),
        ("tinybert-4l", 14_479_676),
        ("distilbert-base", 66_985_530),
        ("roberta-large", 355_412_057),
        ("albert-xxlarge-v2", 223_158_450),
        ("electra-large", 335_142_913),
        ("electra-small-generator", 13_546_682),
        ("deberta-v3-xsmall", 70_958_820),
        ("modernbert-large", 395_881_664),
    ],
)
def test_number_of_parameters_of_the_reference_class(name, count):
    assert parameter_count(families.preset(name)) == count


# What from_options makes of single keys


def test_roberta_counts_positions_from_the_row_after_padding():
    config = tiny(BERT | {"model_type": "roberta"}, max_position_embeddings=66, pad_token_id=3)
    assert (config.position_offset, config.max_length) == (4, 62)
    table = build(config).abstract["encoder"]["input"]["positions"]["table"]
    assert table.shape == (66, 32)


def test_head_activations_that_no_key_changes():
    for family in ("roberta", "electra"):
        config = tiny(BERT | {"model_type": family}, hidden_act="relu", max_position_embeddings=66)
        assert (config.activation, config.lm_activation) == ("relu", "gelu")
    assert tiny(BERT, hidden_act="relu").lm_activation is None
    assert tiny(DISTILBERT).pooler_activation == "relu"
    assert tiny(BERT | {"model_type": "electra"}).pooler_activation == "gelu"
    assert tiny(DEBERTA, pooler_hidden_act="tanh").pooler_activation == "tanh"


def test_modernbert_kinds_of_layers():
    config = tiny(MODERNBERT)
    assert (config.window, config.layer_pattern) == (3, ("global", "local", "local"))
    assert (config.rope.theta, config.rope.local_theta) == (160_000.0, 10_000.0)
    assert tiny(MODERNBERT, global_attn_every_n_layers=2).layer_pattern == ("global", "local")
    assert tiny(MODERNBERT, global_rope_theta=7.0, local_rope_theta=3.0).rope.local_theta == 3.0


def test_albert_projects_an_embedding_of_the_same_width_too():
    config = tiny(ALBERT, embedding_size=32)
    assert build(config).abstract["encoder"]["input"]["project"]["kernel"].shape == (32, 32)
    assert "project" not in build(tiny(BERT)).abstract["encoder"]["input"]


@pytest.mark.parametrize(
    ("raw", "changes", "sentence"),
    [
        (
            BERT,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key', and only absolute",
        ),
        (BERT, {"is_decoder": True}, "is_decoder is True, and only False is supported for bert"),
        (BERT, {"add_cross_attention": True}, "add_cross_attention is True, and only False"),
        (BERT, {"tie_word_embeddings": False}, "tie_word_embeddings is False, and only True is supported for bert"),
        (BERT, {"hidden_act": "quick_gelu"}, 'hidden_act is "quick_gelu", and supported are gelu, '),
        (BERT, {"hidden_size": None}, "has no hidden_size"),
        (ALBERT, {"inner_group_num": 2}, "inner_group_num is 2, and only 1 is supported for albert"),
        (DEBERTA, {"conv_kernel_size": 3}, "conv_kernel_size is 3, and only 0"),
        (DEBERTA, {"embedding_size": 16}, "embedding_size is 16, and only 32"),
        (DEBERTA, {"pos_att_type": []}, "relative_attention without c2p or p2c in pos_att_type is not supported"),
        (DEBERTA, {"relative_attention": False}, "pos_att_type without relative_attention is not supported"),
        (
            MODERNBERT,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling is .*, and only its absence",
        ),
    ],
)
def test_refusals(raw, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        tiny(raw, **changes)


# Names of older files


def renamed(family, name):
    for pattern, replacement in family.RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize(
    ("raw", "heads", "old"),
    [
        (BERT, ("lm",), "bert.encoder.layer.1.output.LayerNorm.gamma"),
        (BERT, ("lm",), "cls.predictions.transform.LayerNorm.beta"),
        (DEBERTA, ("lm",), "lm_predictions.lm_head.dense.weight"),
        (DEBERTA, ("lm",), "lm_predictions.lm_head.LayerNorm.bias"),
        (DEBERTA, ("lm",), "lm_predictions.lm_head.bias"),
    ],
)
def test_other_spellings_of_names(raw, heads, old):
    family, config = families.by_type(raw["model_type"]), dataclasses.replace(tiny(raw), heads=heads)
    theirs = {tensor.theirs for tensor in Mapping(build(config), family.names(config)).tensors}
    assert old not in theirs
    assert renamed(family, old) in theirs


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("bert", "bert.embeddings.position_ids"),
        ("bert", "cls.seq_relationship.weight"),
        ("roberta", "roberta.pooler.dense.bias"),
        ("albert", "albert.pooler.weight"),
        ("electra", "electra.embeddings.position_ids"),
        ("deberta_v2", "mask_predictions.dense.weight"),
        ("deberta_v2", "deberta.embeddings.position_embeddings.weight"),
    ],
)
def test_tensors_of_published_files_without_a_use(family, name):
    assert any(re.search(pattern, name) for pattern in families.FAMILIES[family].IGNORED)


def test_every_family_says_which_tensor_is_a_copy_of_which():
    for name in ("bert", "distilbert", "roberta", "albert", "electra", "deberta_v2", "modernbert"):
        family = families.FAMILIES[name]
        preset = dataclasses.replace(next(iter(family.PRESETS.values())), heads=("lm",))
        theirs = {tensor.theirs for tensor in Mapping(build(preset), family.names(preset)).tensors}
        assert set(family.TIED.values()) <= theirs
        assert not set(family.TIED) & theirs
        assert len(set(family.CLASSES.values())) == len(family.CLASSES)  # a class is known by its heads


# What the networks do


@pytest.mark.parametrize(
    ("raw", "changes"),
    [
        (BERT, {}),
        (MODERNBERT, {}),
        (DEBERTA, {"position_biased_input": False, "type_vocab_size": 0}),
        (DEBERTA, {"position_biased_input": True}),
    ],
    ids=["bert", "modernbert", "deberta", "deberta-absolute"],
)
def test_packed_documents_are_as_alone(raw, changes):
    model = build(tiny(raw, **changes))
    first, second, padding = np.split(np.random.default_rng(0).integers(5, 99, 40), [17, 32])
    places = np.arange(40)
    rows = [
        (
            np.concatenate([first, second, padding]),
            [1] * 17 + [2] * 15 + [0] * 8,
            np.where(places < 17, places, places - 17),
        ),
        (np.concatenate([first, padding, padding, padding[:7]]), [1] * 17 + [0] * 23, places),
        (np.concatenate([second, padding, padding, padding, [5]]), [1] * 15 + [0] * 25, places),
        (np.concatenate([first, second, padding]), [1] * 40, places),
    ]
    tokens, segments, positions = (np.array(part, np.int32) for part in zip(*rows, strict=True))
    packed, one, two, mixed = np.asarray(jax.jit(model.apply)(drawn(model), tokens, positions, segments).hidden)
    np.testing.assert_allclose(packed[:17], one[:17], rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[17:32], two[:15], rtol=0, atol=1e-5)
    assert np.abs(packed - mixed)[:17].max() > 1e-2


def test_modernbert_local_layer_sees_so_many_on_either_side():
    config = tiny(MODERNBERT, num_hidden_layers=1, layer_types=["sliding_attention"])
    model = build(config)
    tokens = jnp.full((2, 20), 7, jnp.int32).at[1, 10].set(8)
    hidden = np.asarray(jax.jit(model.apply)(drawn(model), tokens).hidden)
    differs = np.abs(hidden[1] - hidden[0]).max(-1) > 1e-4
    assert np.flatnonzero(differs).tolist() == [7, 8, 9, 10, 11, 12, 13]  # local_attention 6


@pytest.mark.parametrize(
    "raw", [BERT, ALBERT, BERT | {"model_type": "electra", "embedding_size": 16}], ids=lambda r: r["model_type"]
)
def test_token_types(raw):
    model = build(tiny(raw))
    params, apply = drawn(model), jax.jit(model.apply)
    tokens = np.tile(np.arange(5, 17, dtype=np.int32), (3, 1))
    kinds = np.stack([np.zeros(12), np.arange(12) >= 6, np.ones(12)]).astype(np.int32)
    zeros, halves, _ = np.asarray(apply(params, tokens, token_types=kinds).hidden)
    np.testing.assert_allclose(zeros, apply(params, tokens).hidden[0], rtol=0, atol=1e-5)
    assert np.abs(zeros - halves).max() > 1e-2
    types = params["encoder"]["input"]["token_types"]
    types["table"] = types["table"][::-1]  # kind 1 is now what kind 0 was
    np.testing.assert_array_equal(zeros, apply(params, tokens, token_types=kinds).hidden[2])


def test_shared_layers_get_the_summed_gradient():
    config = tiny(ALBERT, num_hidden_layers=4, num_hidden_groups=2)
    shared, own = build(config), build(dataclasses.replace(config, layer_groups=None))
    params = drawn(shared)
    serves = np.array([0, 0, 1, 1])  # group of each layer
    untied = jax.tree.map(lambda leaf: leaf, params)
    untied["encoder"]["stack"] = jax.tree.map(lambda leaf: leaf[serves], params["encoder"]["stack"])
    tokens = np.random.default_rng(1).integers(5, 99, (2, 24)).astype(np.int32)

    def loss(model, params):
        return jnp.mean(jnp.sin(3.0 * model.apply(params, tokens).hidden))

    gradients = jax.jit(lambda p, q: (jax.grad(lambda x: loss(shared, x))(p), jax.grad(lambda x: loss(own, x))(q)))
    grads, each = (named_leaves(g["encoder"]["stack"]) for g in jax.device_get(gradients(params, untied)))
    for name, got in grads.items():
        expected = each[name].reshape(2, 2, *got.shape[1:]).sum(1)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max() + 1e-8, err_msg=name)


@pytest.mark.parametrize(("activation", "value"), [("tanh", 0.76159416), ("gelu", 0.8413447), ("relu", 1.0)])
def test_pooler_activation(activation, value):
    config = dataclasses.replace(tiny(BERT), heads=("pooler",), pooler_activation=activation)
    model = build(config)
    params = drawn(model)
    params["heads"]["pooler"]["dense"] = {"kernel": jnp.eye(32), "bias": jnp.zeros(32)}
    pooled = model.head_outputs(params, jnp.ones((1, 3, 32)))["pooled"]
    np.testing.assert_allclose(pooled, np.full((1, 32), value, np.float32), atol=1e-6)
