"""The coordinate check, and what muP changes: initialization, learning rate, attention and logits."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from maxpretrain import optim
from maxpretrain.config import ModelConfig, OptimizerConfig, Run
from maxpretrain.errors import UserError
from maxpretrain.models import build
from maxpretrain.nn.attention import mup_scale
from maxpretrain.plan import coordinates

MODEL = ModelConfig(
    vocab_size=64, num_layers=4, model_dim=64, num_heads=4, position="rope", bias=False, depth_scaled_init=False
)
RUN = Run(model=MODEL, optimizer=OptimizerConfig(peak_lr=1e-2, weight_decay=0.0))


def test_activations_grow_with_the_width_without_mup_and_not_with_it(tmp_path):
    check = coordinates.coordinate_check(RUN, (32, 64, 128), steps=3)
    assert check.is_flat("mup")
    assert not check.is_flat("standard")
    assert -0.3 < check.exponent("mup", "layer 2") < 0.1
    assert check.exponent("standard", "layer 2") > 0.7
    assert "muP, base width 32: flat" in coordinates.render(check)
    assert "standard parametrization: not flat" in coordinates.render(check)
    assert (
        check.sizes["mup"]["logits"][-1][0] == check.sizes["standard"]["logits"][-1][0]
    )  # at the base they are the same
    coordinates.plot(check, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_what_mup_changes():
    wide = dataclasses.replace(MODEL, model_dim=256, num_heads=16, mup_base=64)
    params, plain = (
        jax.jit(build(c).init)(jax.random.key(0)) for c in (wide, dataclasses.replace(wide, mup_base=None))
    )
    kernel = lambda p: np.std(p["decoder"]["stack"]["block"]["mlp"]["up"]["kernel"])  # noqa: E731
    assert kernel(params) == pytest.approx(kernel(plain) / 2)  # 1/√4
    np.testing.assert_array_equal(params["embed"]["table"], plain["embed"]["table"])
    scales = optim.update_scales(build(wide).abstract, wide.mup_ratio)
    assert scales["decoder"]["stack"]["block"]["attention"]["query"]["kernel"] == 0.25
    assert scales["embed"]["table"] == scales["decoder"]["norm"]["scale"] == 1.0
    assert optim.update_scales(build(MODEL).abstract, 1.0) is None
    untied = dataclasses.replace(wide, tie_embeddings=False)
    assert optim.update_scales(build(untied).abstract, 0.25)["unembed"]["kernel"] == 1.0
    hidden = jax.random.normal(jax.random.key(1), (1, 3, 256))
    np.testing.assert_allclose(
        build(wide).logits(plain, hidden) * 4,
        build(dataclasses.replace(wide, mup_base=None)).logits(plain, hidden),
        rtol=1e-5,
    )
    assert mup_scale(dataclasses.replace(wide, mup_base_head=16), 64) == 0.0625  # √16/64
    assert mup_scale(wide, 64) == 0.125


@pytest.mark.parametrize(
    ("widths", "message"),
    [((64,), "names 1 width; give at least two"), ((64, 100), "--widths 100 is not divisible by 1 heads of width 16")],
)
def test_widths_that_cannot_be(widths, message):
    with pytest.raises(UserError, match=message):
        coordinates.coordinate_check(RUN, widths)


def test_default_widths_keep_the_head():
    assert coordinates.default_widths(MODEL) == (64, 128, 256, 512)
    llama = dataclasses.replace(MODEL, model_dim=4096, num_heads=32, num_kv_heads=8)
    assert coordinates.default_widths(llama) == (512, 1024, 2048, 4096)
