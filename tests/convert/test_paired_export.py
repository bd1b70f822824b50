"""What a run with a generator leaves behind, as files: the discriminator, and the generator within."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxpretrain as mp
from maxpretrain import configio
from maxpretrain.checkpoint import Checkpoints
from maxpretrain.config import Run, TokenizerConfig
from maxpretrain.convert.exporting import export
from maxpretrain.errors import UserError
from maxpretrain.models import families
from maxpretrain.nn.base import is_spec
from maxpretrain.objectives import ELECTRA, MLM, RTD
from maxpretrain.rundir import RunDirectory

SMALL = {
    "vocab_size": 40,
    "num_layers": 2,
    "model_dim": 16,
    "num_heads": 2,
    "mlp_dim": 24,
    "max_length": 16,
    "dropout": 0.0,
}
SHAPES = {
    name: dataclasses.replace(families.preset(name), heads=("replaced",), **SMALL)
    for name in ("electra-base", "deberta-v3-base")
}
TOKENS = np.arange(24).reshape(2, 12)


def trained(root, objective, model):
    """A run directory of a network that is not as it was drawn, and what is in it."""
    rng = np.random.default_rng(0)
    draw = lambda spec: jnp.asarray(0.2 * rng.standard_normal(spec.shape), jnp.float32)  # noqa: E731
    network = objective.build(model)
    params = jax.tree.map(draw, network.abstract, is_leaf=is_spec)
    path = root / "run"
    path.mkdir()
    run = Run(
        name="run", root=str(root), model=model, objective=objective, tokenizer=TokenizerConfig(kind="huggingface")
    )
    (path / "config.json").write_text(configio.to_json(run))
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": params, "step": jnp.asarray(7, jnp.int32)}, {}, final=True)
    return path, network, params


def test_both_networks_of_an_electra(tmp_path):
    path, network, params = trained(tmp_path, ELECTRA(generator_share=0.5), SHAPES["electra-base"])
    result = export(RunDirectory.open(path), tmp_path / "out")
    assert result["class"] == "ElectraForPreTraining"
    assert result["files"] == ["model.safetensors", "generator/model.safetensors"]
    ours, back = mp.load(path).outputs(TOKENS), mp.load(tmp_path / "out").outputs(TOKENS)
    np.testing.assert_array_equal(ours["replaced_logits"], back["replaced_logits"])
    within = mp.load(tmp_path / "out" / "generator")
    assert within.config.model.heads == ("lm",)
    assert within.config.model.model_dim == 8
    own = network.generator_params(params)
    hidden = network.generator.apply(own, jnp.asarray(TOKENS, jnp.int32)).hidden
    np.testing.assert_allclose(within.logits(TOKENS), network.generator.logits(own, hidden), atol=1e-6)
    export(RunDirectory.open(path), tmp_path / "out")  # its own kind is replaced


def test_the_table_of_a_disentangled_pair_is_added_up(tmp_path):
    path, _, params = trained(tmp_path, RTD(), SHAPES["deberta-v3-base"])
    result = export(RunDirectory.open(path), tmp_path / "out")
    assert result["class"] == "DebertaV2Model"
    assert result["files"] == ["model.safetensors"]
    said = " ".join(result["notes"])
    assert "DebertaV2Model has no head replaced, which was left out" in said
    assert "the generator was left out: no published class has this shape" in said
    assert "model.mask_decoder (False, not True)" in said
    run, back = mp.load(path), mp.load(tmp_path / "out")
    table = params["embed"]["table"] + params["generator"]["embed"]["table"]
    np.testing.assert_array_equal(back.params["embed"]["table"], table)
    np.testing.assert_array_equal(run.outputs(TOKENS)["hidden"], back.outputs(TOKENS)["hidden"])


def test_a_shape_that_no_class_has_is_refused(tmp_path):
    path, *_ = trained(tmp_path, ELECTRA(), dataclasses.replace(SHAPES["electra-base"], norm_placement="pre"))
    with pytest.raises(UserError, match=r"nearest is ElectraForPreTraining, which differs in model\.norm_placement"):
        export(RunDirectory.open(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_of_another_objective_do_not_pass_for_ones_own():
    model = SHAPES["deberta-v3-base"]
    kinds = [
        RTD(),
        RTD(sharing="none"),
        RTD(generator_depth=1.0),
        MLM(),
    ]
    networks = [objective.build(model) for objective in kinds]
    for a, first in enumerate(networks):
        assert [first.keeps_like(second) for second in networks] == [a == b for b in range(len(networks))]
