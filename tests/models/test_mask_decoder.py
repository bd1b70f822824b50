"""DeBERTa's enhanced mask decoder against a computation written out by hand from the same parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.config import ModelConfig
from maxpretrain.errors import UserError
from maxpretrain.fingerprint import named_leaves
from maxpretrain.modelconfig import RelativeConfig, validate_model
from maxpretrain.models import build, families, parameter_count
from maxpretrain.nn.base import is_spec
from maxpretrain.nn.stack import Execution

B, T, D, H, K, V = 2, 11, 16, 2, 8, 40
SEGMENTS = np.array([[1] * 11, [1] * 8 + [0] * 3], np.int32)
SHAPE = ModelConfig(
    architecture="encoder",
    vocab_size=V,
    num_layers=3,
    model_dim=D,
    num_heads=H,
    mlp_dim=24,
    max_length=16,
    position="disentangled",
    relative=RelativeConfig(buckets=4, max_distance=8),
    norm_placement="post",
    norm_eps=1e-7,
    embed_norm=True,
    activation="gelu",
    lm_transform=True,
    lm_bias=True,
    depth_scaled_init=False,
    mask_decoder=True,
)
TOKENS = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)


def drawn(abstract, scale=0.3):
    """Parameters of some size, norms around 1."""
    rng = np.random.default_rng(0)

    def draw(path, spec):
        return jnp.asarray((path[-1].key == "scale") + scale * rng.standard_normal(spec.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract, is_leaf=is_spec)


def normed(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-7) * scale + bias


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)


def by_hand(params):
    """Hidden states [B, T, D] in float64, the attention with one loop a term."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(params).items()}
    table = normed(
        p["encoder/disentangled/table"], p["encoder/disentangled/norm/scale"], p["encoder/disentangled/norm/bias"]
    )
    # Distances up to 2 have a bucket each; 3 to 7 share bucket 3, 8 and beyond lie past it; the table ends at ±4.
    bucket = lambda d: int(np.sign(d)) * (abs(d) if abs(d) <= 2 else 3 if abs(d) <= 7 else 4)  # noqa: E731
    row = np.array([[min(max(bucket(i - j) + 4, 0), 7) for j in range(T)] for i in range(T)])
    blocked = SEGMENTS[:, :, None] != SEGMENTS[:, None, :]

    def layer(index, queries, source):
        w = {name.removeprefix("encoder/stack/block/"): leaf[index] for name, leaf in p.items() if "/stack/" in name}

        def project(x, name):
            return np.einsum("...d,dhk->...hk", x, w[f"attention/{name}/kernel"]) + w[f"attention/{name}/bias"]

        q, k, v = project(queries, "query"), project(source, "key"), project(source, "value")
        place_q, place_k = project(table, "query"), project(table, "key")
        scores = np.zeros((B, H, T, T))
        for i in range(T):
            for j in range(T):
                content = np.einsum("bhk,bhk->bh", q[:, i], k[:, j])
                to_place = np.einsum("bhk,hk->bh", q[:, i], place_k[row[i, j]])
                from_place = np.einsum("bhk,hk->bh", k[:, j], place_q[row[i, j]])
                scores[:, :, i, j] = (content + to_place + from_place) / np.sqrt(3 * K)
        scores = np.where(blocked[:, None], -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhij,bjhk->bihk", weights, v)
        y = np.einsum("bihk,hkd->bid", y, w["attention/out/kernel"]) + w["attention/out/bias"]
        x = normed(queries + y, w["attention_norm/scale"], w["attention_norm/bias"])
        y = gelu(x @ w["mlp/up/kernel"] + w["mlp/up/bias"]) @ w["mlp/down/kernel"] + w["mlp/down/bias"]
        return normed(x + y, w["mlp_norm/scale"], w["mlp_norm/bias"])

    x = normed(p["embed/table"][TOKENS], p["encoder/input/norm/scale"], p["encoder/input/norm/bias"])
    for index in (0, 1):
        x = layer(index, x, x)
    queries = x + p["encoder/mask_decoder/table"][:T]
    for _ in range(2):  # the same layer, the same keys and values
        queries = layer(2, queries, x)
    return queries


@pytest.mark.parametrize(
    "execution", [Execution(), Execution(scan=False), Execution(remat="full")], ids=("loop", "unrolled", "remat")
)
def test_the_last_layer_runs_twice_over_what_it_is_given(execution):
    model = build(SHAPE, execution)
    params = drawn(model.abstract)
    got = model.apply(params, TOKENS, segments=SEGMENTS).hidden
    real = SEGMENTS > 0  # nothing is said about padding
    np.testing.assert_allclose(got[real], by_hand(params)[real], atol=2e-5)


def test_positions_are_of_the_document_where_documents_are_packed():
    model = build(SHAPE)
    params = drawn(model.abstract)
    alone = model.apply(params, TOKENS[:1, 5:], segments=np.ones((1, 6), np.int32)).hidden
    segments = np.array([[1] * 5 + [2] * 6], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]], np.int32)
    packed = model.apply(params, TOKENS[:1], positions, segments).hidden
    np.testing.assert_allclose(packed[:, 5:], alone, atol=2e-5)


def test_gradients_are_the_same_in_a_loop_and_unrolled():
    grads = []
    for execution in (Execution(), Execution(scan=False, remat="dots")):
        model = build(SHAPE, execution)
        params = drawn(model.abstract)
        total = lambda p, model=model: jnp.sum(jnp.sin(model.apply(p, TOKENS, segments=SEGMENTS).hidden))  # noqa: E731
        grads.append(named_leaves(jax.jit(jax.grad(total))(params)))
    for name, value in grads[0].items():
        np.testing.assert_allclose(value, grads[1][name], rtol=2e-4, atol=2e-4, err_msg=name)
    assert all(np.abs(grads[0]["encoder/stack/block/mlp/up/kernel"]).max((1, 2)) > 0)
    assert np.abs(grads[0]["encoder/mask_decoder/table"][:T]).min() > 0


def test_one_table_more():
    off = dataclasses.replace(SHAPE, mask_decoder=False)
    assert parameter_count(SHAPE) - parameter_count(off) == 256  # 16 positions of width 16
    deberta = families.preset("deberta-v3-base")
    assert parameter_count(deberta) == 184_551_780
    assert parameter_count(dataclasses.replace(deberta, mask_decoder=True)) == 184_551_780 + 512 * 768


def test_a_single_layer_decodes_the_embeddings():
    model = build(dataclasses.replace(SHAPE, num_layers=1))
    params = drawn(model.abstract)
    params["encoder"]["mask_decoder"]["table"] *= 0
    # Without positions the first of the two passes is the network without a mask decoder.
    plain = build(dataclasses.replace(SHAPE, num_layers=1, mask_decoder=False))
    encoder = {name: part for name, part in params["encoder"].items() if name != "mask_decoder"}
    once = plain.apply(params | {"encoder": encoder}, TOKENS).hidden
    twice = model.apply(params, TOKENS).hidden
    assert np.abs(once - twice).max() > 0.1
    assert twice.shape == (B, T, D)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "decoder", "position": "learned"}, "mask_decoder is for encoders"),
        ({"max_length": 8}, "batch.length 9 is longer than model.max_length 8"),
    ],
)
def test_refused(change, message):
    with pytest.raises(UserError, match=message):
        validate_model(dataclasses.replace(SHAPE, **change), 9)
