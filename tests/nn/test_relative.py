"""Buckets by the published values, T5's bias and DeBERTa's terms by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.modelconfig import RelativeConfig
from maxpretrain.nn import init as inits
from maxpretrain.nn.base import Template
from maxpretrain.nn.relative import (
    Disentangled,
    T5Bias,
    deberta_bucket,
    disentangled_index,
    disentangled_scale,
    disentangled_scores,
    t5_bucket,
)


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


BIDIRECTIONAL = {
    -128: 15,
    -64: 14,
    -32: 12,
    -16: 10,
    -8: 8,
    -7: 7,
    -1: 1,
    0: 0,
    1: 17,
    7: 23,
    8: 24,
    16: 26,
    32: 28,
    64: 30,
    127: 31,
    5000: 31,
}
CAUSAL = {-1: 1, -8: 8, -16: 16, -32: 21, -64: 26, -127: 31, -128: 31, -5000: 31, 0: 0, 1: 0, 100: 0}


@pytest.mark.parametrize(("bidirectional", "golden"), [(True, BIDIRECTIONAL), (False, CAUSAL)])
def test_t5_bucket(bidirectional, golden):
    relative = jnp.asarray(list(golden), jnp.int32)
    found = jax.jit(lambda r: t5_bucket(r, bidirectional=bidirectional, buckets=32, max_distance=128))(relative)
    assert found.dtype == jnp.int32
    assert found.tolist() == list(golden.values())


def test_t5_bucket_on_borders():
    # Halfway in the logarithm: 50/18 = (30/18)² and 100/36 = (60/36)². Transformers puts both above, too.
    ask = lambda d, **kw: int(t5_bucket(jnp.asarray(d, jnp.int32), **kw))  # noqa: E731
    assert [ask(-d, bidirectional=True, buckets=72, max_distance=50) for d in (29, 30)] == [26, 27]
    assert [ask(-d, bidirectional=False, buckets=72, max_distance=100) for d in (59, 60)] == [53, 54]
    with pytest.raises(ValueError, match="beyond them"):
        ask(3, bidirectional=False, buckets=32, max_distance=16)


# 8 buckets up to 20: 0, 1, 2 … 6 and beyond on each side, or 0, 1, 2, 3, 4 … 5, 6 … 8, 9 … 13 and beyond on one.
@pytest.mark.parametrize(
    ("bidirectional", "rows"),
    [
        (True, [[2, 1, 0, 5, 6], [3, 2, 2, 2, 2]]),
        (False, [[4, 1, 0, 0, 0], [6, 5, 4, 4, 2]]),
    ],
)
def test_t5_bias(bidirectional, rows):
    relative = RelativeConfig(buckets=8, max_distance=20)
    template = Template(T5Bias(3, relative, inits.normal(1.0), bidirectional=bidirectional))
    spec = template.abstract["table"]
    assert (spec.shape, spec.axes, spec.role) == ((8, 3), (None, "heads"), "position")
    table = draw(np.random.default_rng(0), 8, 3)
    bias = template.bind({"table": jnp.asarray(table)})

    queries, keys = [4, 9], [0, 3, 4, 5, 7]
    found = bias(jnp.asarray([queries], jnp.int32), jnp.asarray([keys, keys], jnp.int32))
    assert found.shape == (2, 3, 2, 5)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[1], table[np.array(rows)].transpose(2, 0, 1))

    for t, s in ((30, 30), (7, 12)):
        at = [jnp.arange(n, dtype=jnp.int32)[None] for n in (t, s)]
        np.testing.assert_array_equal(bias.by_rows(t, s), bias(*at))


@pytest.mark.parametrize(
    ("buckets", "max_distance", "golden"),
    [
        (
            256,
            512,
            {0: 0, 1: 1, 127: 127, 128: 128, 129: 129, 130: 130, 200: 169, 257: 192, 300: 207, 511: 255, 512: 256},
        ),
        (8, 64, {0: 0, 1: 1, 4: 4, 5: 5, 10: 5, 11: 6, 12: 6}),
        # transformers' float32 rounds the logarithm down to 171 exactly; it is a little more.
        (512, 4096, {1642: 427, 1643: 427, 1644: 428}),
        (0, 64, {0: 0, 5: 5, 63: 63, 100: 100}),
    ],
)
def test_deberta_bucket(buckets, max_distance, golden):
    distances = np.array(list(golden))
    assert deberta_bucket(distances, buckets, max_distance).tolist() == list(golden.values())
    assert deberta_bucket(-distances, buckets, max_distance).tolist() == [-v for v in golden.values()]


def test_disentangled_index():
    # Distances 1 − 3 … 12 − 1 with buckets 0 1 2 3 4 5 5 5 5 5 5 6, then clamped between 0 and 2·span − 1.
    index = disentangled_index(12, 3, RelativeConfig(buckets=8, max_distance=64))
    assert index.tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 13, 13, 13, 13, 13, 14]
    each = disentangled_index(5, 5, RelativeConfig(buckets=0, max_distance=3))
    assert each.tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5]


# 256 rows are taken in blocks of 128.
@pytest.mark.parametrize(("t", "s"), [(20, 20), (1, 9), (256, 24), (24, 256)])
@pytest.mark.parametrize("terms", [("c2p", "p2c"), ("c2p",), ("p2c",)])
def test_disentangled_scores_by_loops(t, s, terms):
    rng = np.random.default_rng(0)
    relative = RelativeConfig(buckets=8, max_distance=64, terms=terms)
    q, k = draw(rng, 2, t, 3, 4), draw(rng, 2, s, 3, 4)
    r_q, r_k = draw(rng, 16, 3, 4), draw(rng, 16, 3, 4)

    scale = 1 / np.sqrt(4.0 * (1 + len(terms)))
    expected = np.zeros((2, 3, t, s), np.float64)
    for i in range(t):
        for j in range(s):
            row = int(np.clip(deberta_bucket(np.array(i - j), 8, 64) + 8, 0, 15))
            if "c2p" in terms:
                expected[:, :, i, j] += (q[:, i].astype(np.float64) * r_k[row]).sum(-1) * scale
            if "p2c" in terms:
                expected[:, :, i, j] += (k[:, j].astype(np.float64) * r_q[row]).sum(-1) * scale

    assert disentangled_scale(4, terms) == pytest.approx(scale, rel=1e-12)
    found = jax.jit(disentangled_scores, static_argnums=5)(
        jnp.asarray(q),
        jnp.asarray(k),
        jnp.asarray(r_q) if "p2c" in terms else None,
        jnp.asarray(r_k) if "c2p" in terms else None,
        disentangled_index(t, s, relative),
        disentangled_scale(4, terms),
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_disentangled_gradient_is_that_of_gathering():
    rng = np.random.default_rng(1)
    relative = RelativeConfig(buckets=16, max_distance=64)
    index = disentangled_index(128, 128, relative)
    pairs = jnp.asarray(index[np.arange(128)[:, None] - np.arange(128)[None, :] + 127])
    cotangent = jnp.asarray(draw(rng, 1, 2, 128, 128))
    inputs = [jnp.asarray(draw(rng, *shape)) for shape in ((1, 128, 2, 4),) * 2 + ((32, 2, 4),) * 2]

    def gathered(q, k, r_q, r_k):
        c2p = jnp.einsum("bthk,tshk->bhts", q, r_k[pairs])
        return 0.5 * (c2p + jnp.einsum("bshk,tshk->bhts", k, r_q[pairs]))

    value, pull = jax.vjp(lambda *a: disentangled_scores(*a, index, 0.5), *inputs)
    expected, pull_expected = jax.vjp(gathered, *inputs)
    np.testing.assert_allclose(value, expected, atol=5e-6)
    for found, wanted in zip(pull(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_disentangled_scores_look_both_ways_and_within_a_packed_document():
    rng = np.random.default_rng(2)
    relative = RelativeConfig(buckets=8, max_distance=64)
    q, k = (jnp.asarray(draw(rng, 1, 40, 2, 4)) for _ in range(2))
    r_q, r_k = (jnp.asarray(draw(rng, 16, 2, 4)) for _ in range(2))
    whole = np.asarray(disentangled_scores(q, k, r_q, r_k, disentangled_index(40, 40, relative), 1.0))
    # A document at rows 15 … 31 has the scores that it has alone.
    alone = disentangled_scores(q[:, 15:32], k[:, 15:32], r_q, r_k, disentangled_index(17, 17, relative), 1.0)
    np.testing.assert_allclose(whole[:, :, 15:32, 15:32], alone, atol=5e-6)
    # Keys after the query count, and by rows of their own.
    other = np.asarray(disentangled_scores(q, k, r_q.at[:8].add(1.0), r_k, disentangled_index(40, 40, relative), 1.0))
    changed = np.abs(other - whole)[0, 0] > 1e-3
    assert changed[np.triu_indices(40, 1)].all()
    assert not changed[np.tril_indices(40)].any()


def test_disentangled_scores_need_a_term():
    x = jnp.zeros((1, 4, 1, 2), jnp.float32)
    with pytest.raises(ValueError, match="without a term"):
        disentangled_scores(x, x, None, None, disentangled_index(4, 4, RelativeConfig(buckets=4, max_distance=8)), 1.0)


def test_disentangled_table():
    template = Template(Disentangled(2, RelativeConfig(buckets=0, max_distance=3), 0.0, inits.normal(1.0)))
    spec = template.abstract["table"]
    assert (spec.shape, spec.axes, spec.role) == ((6, 2), ("position", "embed"), "position")
    table = jnp.asarray([[1.0, 3.0], [4.0, 2.0], [0.0, 1.0], [5.0, 6.0], [9.0, 8.0], [2.0, 7.0]], jnp.float32)
    norm = {"scale": jnp.asarray([2.0, 1.0], jnp.float32), "bias": jnp.asarray([0.0, 10.0], jnp.float32)}
    found = template.bind({"table": table, "norm": norm})(jnp.float32)
    np.testing.assert_allclose(found, [[-2, 11], [2, 9], [-2, 11], [-2, 11], [2, 9], [-2, 11]], atol=1e-6)
    bare = Template(Disentangled(2, RelativeConfig(buckets=3, max_distance=9, norm=False), 0.0, inits.normal(1.0)))
    assert list(bare.abstract) == ["table"]
    assert bare.bind({"table": table})(jnp.bfloat16).dtype == jnp.bfloat16
