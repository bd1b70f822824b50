"""The activations by their values: the two forms of GELU differ by 1.5e-4 at 1."""

import jax.numpy as jnp
import pytest

from maxpretrain.nn.mlp import ACTIVATIONS


@pytest.mark.parametrize(
    ("name", "x", "value"),
    [
        ("gelu", 1.0, 0.8413447),
        ("gelu_tanh", 1.0, 0.8411920),
        ("relu", -1.0, 0.0),
        ("relu", 3.0, 3.0),
        ("squared_relu", -1.0, 0.0),
        ("squared_relu", 3.0, 9.0),
        ("silu", 1.0, 0.7310586),
        ("tanh", 1.0, 0.7615942),
    ],
)
def test_values(name, x, value):
    assert float(ACTIVATIONS[name](jnp.float32(x))) == pytest.approx(value, abs=2e-7)
