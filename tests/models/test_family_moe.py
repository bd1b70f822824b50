"""Families with experts: their options, gradients, meshes and decoding, beyond what test_families.py compares."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import answers, config_of, inputs_of, loss_of

from maxpretrain import mesh
from maxpretrain.config import MeshConfig, ModelConfig, MoEConfig
from maxpretrain.convert.mapping import Mapping, as_tree
from maxpretrain.errors import UserError
from maxpretrain.fingerprint import named_leaves
from maxpretrain.models import build, families
from maxpretrain.models.families.options import Options
from maxpretrain.nn.stack import Execution

GOLDENS = Path(__file__).parents[1] / "golden" / "families"


def load(name, **changes):
    """A golden, its model and parameters."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        golden = dict(file)
    family, config = config_of(golden)
    model = build(config, Execution(**changes))
    weights = {key.removeprefix("weights/"): value for key, value in golden.items() if key.startswith("weights/")}
    leaves = Mapping(model, family.names(config)).load(weights.__getitem__, "golden")
    return golden, model, as_tree({key: jnp.asarray(value) for key, value in leaves})


# Gradients


def check_reach(grads):
    """Every parameter of every layer and every expert has a gradient, but the bias that moves by a rule of its own."""
    for path, grad in named_leaves(grads).items():
        grad = np.abs(np.asarray(grad))
        assert np.isfinite(grad).all(), path
        kept = ("/stack/" in path) + ("/experts/mlp/experts/" in path)  # leading axes: layers, experts
        largest = grad.reshape(*grad.shape[:kept], -1).max(-1)
        if path.endswith("/balance_bias"):
            assert not largest.any()
        else:
            assert (largest > 1e-6).all(), (path, largest)


@pytest.mark.parametrize("name", ["qwen3-moe-dense-layer", "olmoe"])
def test_gradients_reach_every_parameter(name):
    golden, model, params = load(name)
    inputs = inputs_of(golden)
    check_reach(jax.jit(jax.grad(lambda p: loss_of(model, golden, answers(model, p, inputs))))(params))


# Meshes


def widened(model, params):
    """The same with one more token in the vocabulary: 99 cannot be cut in two."""
    config = dataclasses.replace(model.config, vocab_size=100)
    table, kernel = params["embed"]["table"], params["unembed"]["kernel"]
    more = {
        "embed": {"table": jnp.concatenate([table, table[:1]])},
        "unembed": {"kernel": jnp.concatenate([kernel, kernel[:, :1]], 1)},
    }
    return build(config, model.execution), params | more


MESHES = {
    "expert": {"data": 2, "fsdp": 2, "expert": 2},
    "tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}


def on_eight_rows(name):
    """Parameters and inputs of a golden four times over; and loss, (logits, loads) and gradients as a function of them."""
    golden, model, params = load(name)
    model, params = widened(model, params)
    golden = golden | {"labels": np.tile(golden["labels"], (4, 1))}

    def objective(params, inputs):
        output = model.apply(params, **inputs)
        logits = model.logits(params, output.hidden)
        return loss_of(model, golden, {"logits": logits}), (logits, output.aux["load"])

    inputs = {key: jnp.tile(value, (4, 1)) for key, value in inputs_of(golden).items()}
    return model, params, inputs, jax.value_and_grad(objective, has_aux=True)


@functools.cache
def on_one_device(name):
    _, params, inputs, f = on_eight_rows(name)
    return jax.jit(f)(params, inputs)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("deepseek-v3", "expert"),
        ("mixtral", "tensor"),
        pytest.param("deepseek-v3", "tensor", marks=pytest.mark.families),
        pytest.param("mixtral", "expert", marks=pytest.mark.families),
    ],
)
def test_eight_devices_say_what_one_says(name, axes):
    (loss, (logits, loads)), grads = on_one_device(name)
    check_reach(grads)
    model, params, inputs, f = on_eight_rows(name)
    layout = mesh.make_layout(MeshConfig(**MESHES[axes]))
    layout.check(model.abstract, 8)
    shardings = layout.param_shardings(model.abstract)
    with mesh.use(layout):
        params = jax.tree.map(jax.device_put, params, shardings)
        inputs = jax.device_put(inputs, layout.batch_sharding())
        (got_loss, (got_logits, got_loads)), got_grads = jax.jit(f, out_shardings=(None, shardings))(params, inputs)
    np.testing.assert_allclose(got_logits, logits, rtol=0, atol=2e-5)
    assert float(got_loss) == pytest.approx(float(loss), rel=2e-6)
    np.testing.assert_array_equal(got_loads, loads)
    choices = {"mixtral": 2, "deepseek-v3": 3}[name] * 4 * (52 + 41)  # of experts, by all tokens
    np.testing.assert_array_equal(np.sum(loads, 1), [choices, choices])  # two layers have experts
    found = named_leaves(got_grads)
    for path, expected in named_leaves(grads).items():
        atol = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=atol, err_msg=path)
    up = found["decoder/stack/experts/mlp/experts/up/kernel"]  # [layers, experts, D, F]
    assert (
        up.sharding.shard_shape(up.shape)
        == {
            ("mixtral", "expert"): (2, 2, 16, 40),
            ("mixtral", "tensor"): (2, 4, 16, 20),
            ("deepseek-v3", "expert"): (2, 4, 16, 12),
            ("deepseek-v3", "tensor"): (2, 8, 16, 6),
        }[name, axes]
    )


# Decoding


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("mixtral", 0),
        ("mixtral-window", 11),
        ("deepseek-v3", 0),
        ("deepseek-v3-no-query-latent", 0),
        ("deepseek-v3-yarn", 11),
    ],
)
def test_token_by_token_as_all_at_once(name, prompt):
    golden, model, params = load(name)
    tokens = jnp.asarray(golden["ids"], jnp.int32)
    batch, length = tokens.shape
    expected = model.logits(params, jax.jit(model.apply)(params, tokens).hidden)

    def step(cache, at):
        token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, 1)
        hidden, cache = model.decode(params, token, jnp.full((batch, 1), at, jnp.int32), cache)
        return cache, model.logits(params, hidden[:, 0])

    @jax.jit
    def run(cache):
        if prompt:
            positions = jnp.broadcast_to(jnp.arange(prompt, dtype=jnp.int32), (batch, prompt))
            cache = model.decode(params, tokens[:, :prompt], positions, cache)[1]
        return jax.lax.scan(step, cache, jnp.arange(prompt, length, dtype=jnp.int32))[1]

    got = run(model.empty_cache(batch, length)).swapaxes(0, 1)
    np.testing.assert_allclose(got, expected[:, prompt:], rtol=0, atol=2e-5)


# Options

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1e6,
    "sliding_window": None,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": False,
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40_960,
    "max_window_layers": 48,
    "use_sliding_window": False,
    "sliding_window": None,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 50_304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "clip_qkv": None,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 163_840,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10_000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "mixtral-8x7b": MIXTRAL,
    "mixtral-8x22b": MIXTRAL
    | {
        "hidden_size": 6144,
        "intermediate_size": 16_384,
        "num_hidden_layers": 56,
        "num_attention_heads": 48,
        "max_position_embeddings": 65_536,
    },
    "qwen3-30b-a3b": QWEN3,
    "qwen3-235b-a22b": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "max_window_layers": 94,
    },
    "olmoe-1b-7b": OLMOE,
    "deepseek-v3": DEEPSEEK,
}


def read(options) -> ModelConfig:
    family = families.by_type(options["model_type"])
    return family.from_options(Options(options))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_is_the_preset(name):
    preset = families.preset(name)
    initial = {field: getattr(preset, field) for field in ("init", "init_std", "depth_scaled_init")}
    assert dataclasses.replace(read(PUBLISHED[name]), **initial) == preset


def test_presets_that_are_initialized_by_their_papers():
    deepseek, olmoe = families.preset("deepseek-v3"), families.preset("olmoe-1b-7b")
    assert (deepseek.init, deepseek.init_std) == ("normal", 0.006)
    assert (olmoe.init, olmoe.init_std) == ("truncated_normal", 0.02)


REFUSED = [
    (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1, and only 0.0 is supported for mixtral"),
    (MIXTRAL | {"hidden_act": "quick_gelu"}, 'hidden_act is "quick_gelu"'),
    (OLMOE | {"clip_qkv": 8.0}, "clip_qkv is 8.0, and only its absence is supported for olmoe"),
    (OLMOE | {"head_dim": 64}, "head_dim is 64, and only 128 is supported for olmoe"),
    (OLMOE | {"sliding_window": 64}, "sliding_window is 64"),
    (DEEPSEEK | {"num_key_value_heads": 8}, "num_key_value_heads is 8, and only 128 is supported for deepseek_v3"),
    (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func is 'softmax', and only sigmoid"),
    (DEEPSEEK | {"topk_method": "greedy"}, "topk_method is 'greedy', and only noaux_tc"),
    (DEEPSEEK | {"moe_layer_freq": 2}, "moe_layer_freq is 2, and only 1"),
    (QWEN3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (QWEN3 | {"rope_scaling": {"rope_type": "longrope"}}, 'rope_type is "longrope"'),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_we_do_not_build_is_refused(options, sentence):
    with pytest.raises(UserError) as caught:
        read(options)
    assert sentence in str(caught.value)


def without(options, *keys):
    return {key: value for key, value in options.items() if key not in keys}


def test_absent_options_are_the_references_own():
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type")
    bare = lambda options: read({key: options[key] for key in sizes})  # noqa: E731
    mixtral, qwen3, olmoe, deepseek = bare(MIXTRAL), bare(QWEN3), bare(OLMOE), bare(DEEPSEEK)
    assert (mixtral.num_kv_heads, mixtral.rope.theta, mixtral.norm_eps, mixtral.max_length) == (8, 1e6, 1e-5, 131_072)
    assert (mixtral.moe.num_experts, mixtral.moe.top_k, mixtral.window) == (8, 2, None)
    assert (qwen3.num_kv_heads, qwen3.rope.theta, qwen3.norm_eps, qwen3.max_length) == (4, 1e4, 1e-6, 32_768)
    assert (qwen3.moe.num_experts, qwen3.moe.top_k, qwen3.moe.expert_dim) == (128, 8, 768)
    assert (qwen3.moe.renormalize, qwen3.moe.dense_layers, qwen3.window) == (False, (), None)
    assert (olmoe.num_kv_heads, olmoe.norm_eps, olmoe.max_length) == (None, 1e-5, 4096)
    assert (olmoe.moe.num_experts, olmoe.moe.top_k, olmoe.moe.renormalize) == (64, 8, False)
    assert deepseek.moe == families.preset("deepseek-v3").moe
    assert deepseek.latent == families.preset("deepseek-v3").latent
    assert (deepseek.rope.layout, deepseek.rope.theta, deepseek.norm_eps) == ("interleaved", 1e4, 1e-6)


def test_options_that_say_which_layers_have_experts():
    sparse = {"num_hidden_layers": 7, "decoder_sparse_step": 3, "mlp_only_layers": [5]}
    assert read(QWEN3 | sparse).moe.dense_layers == (0, 1, 3, 4, 5, 6)  # only 2 has some
    assert read(DEEPSEEK | {"first_k_dense_replace": 0}).moe.dense_layers == ()
    assert read(DEEPSEEK | {"num_hidden_layers": 2}).moe.dense_layers == (0, 1)
    assert read(QWEN3 | {"use_sliding_window": True, "sliding_window": 64}).window == 64
    assert read(QWEN3 | {"use_sliding_window": False, "sliding_window": 64}).window is None
    assert read(MIXTRAL | {"sliding_window": 64}).window == 64
    assert read(without(QWEN3, "num_experts") | {"num_local_experts": 4}).moe.num_experts == 4
    assert read(DEEPSEEK | {"n_shared_experts": 3}).moe.shared_dim == 6144
    assert read(DEEPSEEK | {"q_lora_rank": None}).latent.q_rank is None
    assert read(DEEPSEEK | {"rope_interleave": False}).rope.layout == "half"


TINY = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
FEW = TINY | {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 12}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "v_head_dim": 6, "n_routed_experts": 8}
OTHERS = {
    "mixtral": MIXTRAL | TINY | {"head_dim": 12, "sliding_window": 8, "tie_word_embeddings": True},
    "qwen3-bias": QWEN3 | FEW | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 9},
    "qwen3-some": QWEN3 | FEW | {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen3-none": QWEN3 | FEW | {"mlp_only_layers": [0, 1, 2, 3]},
    "olmoe": OLMOE | TINY | {"num_key_value_heads": 2, "attention_bias": True, "norm_topk_prob": True},
    "deepseek": DEEPSEEK | TINY | LATENT | {"attention_bias": True, "rope_interleave": False, "q_lora_rank": None},
    "deepseek-dense": DEEPSEEK | TINY | LATENT | {"first_k_dense_replace": 4},
    "deepseek-linear": DEEPSEEK
    | TINY
    | LATENT
    | {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "mscale_all_dim": 1.0}, "first_k_dense_replace": 0},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes_have_names_and_come_back(name):
    config = read(OTHERS[name])
    family = families.by_type(OTHERS[name]["model_type"])
    tensors = Mapping(build(config), family.names(config)).tensors
    assert len({tensor.theirs for tensor in tensors}) == len(tensors)
    assert read(family.to_options(config) | {"model_type": family.MODEL_TYPE}) == config
    if name in ("qwen3-none", "deepseek-dense"):
        assert not any(".experts." in tensor.theirs for tensor in tensors)


def test_deepseek_cannot_export_what_its_options_cannot_say():
    preset, family = families.preset("deepseek-v3"), families.by_type("deepseek_v3")
    with_moe = lambda **changes: dataclasses.replace(preset, moe=dataclasses.replace(preset.moe, **changes))  # noqa: E731
    with pytest.raises(UserError, match=r"dense_layers \(0, 2\) are not the first 2"):
        family.to_options(with_moe(dense_layers=(0, 2)))
    with pytest.raises(UserError, match="shared_dim 3000 is no multiple of an expert's 2048"):
        family.to_options(with_moe(shared_dim=3000))


@pytest.mark.parametrize("name", ["mixtral-8x7b", "olmoe-1b-7b"])
def test_families_without_plain_layers_refuse_them(name):
    preset = families.preset(name)
    family = next(f for f in families.FAMILIES.values() if name in f.PRESETS)
    with pytest.raises(
        UserError, match=f"layer 1 of this model has no experts, and every layer of {family.MODEL_TYPE}"
    ):
        family.to_options(dataclasses.replace(preset, moe=dataclasses.replace(preset.moe, dense_layers=(1,))))
    with pytest.raises(UserError, match="layer 0 of this model has no experts"):
        family.to_options(dataclasses.replace(preset, moe=MoEConfig()))


def test_latent_attention_without_experts_is_a_deepseek_of_plain_layers():
    preset, family = families.preset("deepseek-v3"), families.by_type("deepseek_v3")
    options = family.to_options(dataclasses.replace(preset, moe=MoEConfig()))
    assert (options["first_k_dense_replace"], options["n_routed_experts"]) == (61, 0)


def test_names_of_experts():
    family, config = families.by_type("mixtral"), families.preset("mixtral-8x7b")
    tensors = {tensor.theirs: tensor for tensor in Mapping(build(config), family.names(config)).tensors}
    assert len(tensors) == 32 * (4 + 2 + 1 + 3 * 8) + 3
    tensor = tensors["model.layers.31.block_sparse_moe.experts.7.w2.weight"]
    assert tensor.ours == ("decoder/stack/experts/mlp/experts/down/kernel",)
    assert tensor.index == (31, 7)

    family, config = families.by_type("deepseek_v3"), families.preset("deepseek-v3")
    tensors = {tensor.theirs: tensor for tensor in Mapping(build(config), family.names(config)).tensors}
    # attention 7 and norms 2 in 61 layers; of 58 router and its bias, 256 experts, a shared one; the first 3 plain
    assert len(tensors) == 61 * (7 + 2) + 58 * (2 + 3 * 257) + 3 * 3 + 3
    tensor = tensors["model.layers.3.mlp.gate.e_score_correction_bias"]  # the first layer with experts
    assert tensor.ours == ("decoder/stack/experts/mlp/balance_bias",)
    assert tensor.index == (0,)
