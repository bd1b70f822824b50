"""Positions by their values. Frequencies of stretched rotary positions are those of transformers 5.23."""

import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.modelconfig import RopeConfig
from maxpretrain.nn.position import alibi_slopes, rotary_angles, rotary_frequencies, rotate, sinusoids, yarn_scale

PLAIN = [1.0, 0.316227766, 0.1, 0.0316227766, 0.01, 0.00316227766, 0.001, 0.000316227766]
RAISED = [1.0, 0.249528468, 0.0622644536, 0.0155367535, 0.00387686281, 0.000967387517, 0.000241390735, 6.02338623e-05]

# width, length, config, frequencies, factor of cosines and sines. But for "none" and "ntk" they are what
# ROPE_INIT_FUNCTIONS[rope_type](LlamaConfig(head_dim=width, max_position_embeddings=M, rope_parameters={...}), None,
# seq_len=length) returned (float32, printed with %.9g); M is 64 where original_length is, which then is not in the dict.
CASES = {
    "none": (16, None, RopeConfig(), PLAIN, 1.0),
    "partial": (64, None, RopeConfig(fraction=0.25), PLAIN, 1.0),
    "partial, cut to even": (44, None, RopeConfig(fraction=0.4), PLAIN, 1.0),  # 17.6 entries
    "linear": (
        16,
        None,
        RopeConfig(scaling="linear", factor=4.0),
        [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05],
        1.0,
    ),
    # Dynamic scaling at 200 stretches by 2·200/64 − 1 = 5.25.
    "ntk": (16, None, RopeConfig(scaling="ntk", factor=5.25), RAISED, 1.0),
    "dynamic, longer": (16, 200, RopeConfig(scaling="dynamic", factor=2.0, original_length=64), RAISED, 1.0),
    "dynamic, shorter": (16, 40, RopeConfig(scaling="dynamic", factor=2.0, original_length=64), PLAIN, 1.0),
    "dynamic, unknown": (16, None, RopeConfig(scaling="dynamic", factor=2.0, original_length=64), PLAIN, 1.0),
    "llama3": (
        16,
        None,
        RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_length=8192),
        [1.0, 0.193922758, 0.0376060307, 0.00729266508, 0.000524846022, 3.42810235e-05, 6.64786967e-06, 1.28917316e-06],
        1.0,
    ),
    "llama3, short": (
        16,
        None,
        RopeConfig(scaling="llama3", factor=8.0, original_length=64),
        [1.0, 0.244384587, 0.0130422562, 0.00395284733, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05],
        1.0,
    ),
    "yarn": (
        16,
        None,
        RopeConfig(theta=1e6, scaling="yarn", factor=4.0, original_length=32768),
        [1.0, 0.177827939, 0.0316227786, 0.00421755994, 0.000500000024, 4.44569851e-05, 7.90569356e-06, 1.40585337e-06],
        1.138629436111989,
    ),
    "yarn, mscale": (
        16,
        None,
        RopeConfig(scaling="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.707),
        [1.0, 0.316227764, 0.100000001, 0.0239147246, 0.00512499968, 0.000849862176, 2.49999994e-05, 7.90569447e-06],
        1.0857263992561355,
    ),
    "yarn, not truncated": (
        16,
        None,
        RopeConfig(theta=150_000.0, scaling="yarn", factor=32.0, original_length=4096, truncate=False),
        [1.0, 0.225418001, 0.0508132726, 0.00679495931, 0.000456483918, 1.8188337e-05, 4.09997847e-06, 9.24208962e-07],
        1.3465735902799727,
    ),
    "yarn, attention factor": (
        16,
        None,
        RopeConfig(scaling="yarn", factor=8.0, original_length=64, attention_factor=1.25),
        [1.0, 0.223994657, 0.0416666642, 0.00395284733, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05],
        1.25,
    ),
    "yarn, partial": (
        32,
        None,
        RopeConfig(scaling="yarn", factor=8.0, original_length=512, fraction=0.5),
        [1.0, 0.247052938, 0.0562500022, 0.01087033, 0.00124999997, 0.000395284733, 0.000125000006, 3.95284733e-05],
        1.2079441541679836,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies(case):
    width, length, rope, expected, factor = CASES[case]
    frequencies, found = rotary_frequencies(rope, width, length=length)
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
    assert found == pytest.approx(factor, rel=1e-12)


def test_local_layers_go_unscaled_by_a_base_of_their_own():
    rope = RopeConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8.0)
    np.testing.assert_allclose(rotary_frequencies(rope, 4, local=True)[0], [1.0, 0.01], rtol=1e-12)
    np.testing.assert_allclose(rotary_frequencies(rope, 4)[0], [0.125, 0.000125], rtol=1e-12)
    shared = RopeConfig(theta=1e6, scaling="linear", factor=8.0)
    np.testing.assert_allclose(rotary_frequencies(shared, 4, local=True)[0], [0.125, 0.000125], rtol=1e-12)


def test_frequencies_that_cannot_be():
    with pytest.raises(ValueError, match="no pair of entries to turn"):
        rotary_frequencies(RopeConfig(fraction=0.25), 4)
    with pytest.raises(ValueError, match="no base to raise"):
        rotary_frequencies(RopeConfig(scaling="ntk", factor=2.0), 2)
    with pytest.raises(ValueError, match=r"needs rope\.original_length"):
        rotary_frequencies(RopeConfig(scaling="yarn", factor=2.0), 16)


def test_yarn_scale():
    deepseek = RopeConfig(scaling="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0)
    assert yarn_scale(deepseek) == pytest.approx(1.8738542, rel=1e-7)
    assert rotary_frequencies(deepseek, 64)[1] == 1.0
    assert yarn_scale(RopeConfig(scaling="yarn", factor=40.0, original_length=4096)) == 1.0
    assert yarn_scale(RopeConfig(mscale_all_dim=1.0)) == 1.0


def angles(positions, width, factor=1.0):
    return rotary_angles(jnp.asarray([positions], jnp.int32), rotary_frequencies(RopeConfig(), width)[0], factor)


# Position 1: by 1 and by 0.01 radians.
@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("half", [-1.9841107, 1.9599007, 2.4623779, 4.0197997]),
        ("interleaved", [-1.1426397, 1.9220756, 2.9598507, 4.0297995]),
    ],
)
def test_rotate_by_values(layout, expected):
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], jnp.float32)[None, None, None, :]
    turned = rotate(x, angles([1], 4), layout)
    np.testing.assert_allclose(turned[0, 0, 0], [*expected, 5.0, 6.0], atol=5e-7)
    turned = rotate(x, angles([1], 4, factor=2.0), layout)
    np.testing.assert_allclose(turned[0, 0, 0], [*(2 * v for v in expected), 5.0, 6.0], atol=1e-6)
    assert rotate(x.astype(jnp.bfloat16), angles([1], 4), layout).dtype == jnp.bfloat16


def test_layouts_give_the_same_scores_of_permuted_heads():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 50, 3, 8)), jnp.float32) for _ in range(2))
    turns = angles(range(50), 8)
    scores = lambda a, b: np.asarray(jnp.einsum("bthk,bshk->bhts", a, b))  # noqa: E731
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    interleaved = scores(rotate(q, turns, "interleaved"), rotate(k, turns, "interleaved"))
    np.testing.assert_allclose(
        interleaved, scores(rotate(q[..., order], turns), rotate(k[..., order], turns)), atol=1e-5
    )
    # Without the permutation the layouts are far apart, and only distances matter.
    assert np.abs(interleaved - scores(rotate(q, turns), rotate(k, turns))).max() > 1
    later = angles(range(30, 80), 8)
    moved = scores(rotate(q, later, "interleaved"), rotate(k, later, "interleaved"))
    np.testing.assert_allclose(moved, interleaved, atol=1e-4)


def test_sinusoids():
    values = sinusoids(jnp.asarray([[0, 1]], jnp.int32), 4)
    np.testing.assert_allclose(values[0], [[0, 1, 0, 1], [0.8414710, 0.5403023, 0.0099998, 0.9999500]], atol=1e-7)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [0.00390625]),
        (4, [0.25, 0.0625, 0.015625, 0.00390625]),
        (6, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
        (8, [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]),
        (12, [*(2.0**-i for i in range(1, 9)), 0.70710678, 0.35355339, 0.17677670, 0.08838835]),
    ],
)
def test_alibi_slopes(heads, slopes):
    found = alibi_slopes(heads)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, slopes, rtol=1e-6)
