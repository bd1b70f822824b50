"""The mesh, its resolver, and what it refuses."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from maxpretrain import mesh
from maxpretrain.config import MeshConfig, ModelConfig
from maxpretrain.errors import UserError
from maxpretrain.models import build


def layout(**axes):
    return mesh.make_layout(MeshConfig(**axes))


def test_minus_one_takes_what_the_others_leave():
    assert layout().sizes == {"stage": 1, "data": 8, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    assert layout(fsdp=-1, data=1, tensor=2).sizes["fsdp"] == 4
    assert layout(data=2, fsdp=2, tensor=2).describe() == "data 2 × fsdp 2 × tensor 2"


def test_axes_must_multiply_to_the_devices():
    with pytest.raises(UserError, match=re.escape("mesh data 4 × tensor 4 needs 16 devices, but 8 are here")):
        layout(data=4, tensor=4)
    with pytest.raises(UserError, match=re.escape("mesh fsdp 3 = 3 does not divide the 8 devices")):
        layout(fsdp=3)


def test_logical_axes_resolve_to_mesh_axes():
    two = layout(data=2, fsdp=2, tensor=2)
    assert two.spec(("batch", "length")) == P(("data", "fsdp", "expert"), None)
    assert two.spec(("layers", "embed", "mlp")) == P(None, ("fsdp",), ("tensor",))
    assert two.spec(("vocab", "embed")) == P(("tensor",), ("fsdp",))
    assert two.spec(("width",)) == P(None)


def test_the_resolver_raises():
    two = layout(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match='no rule for the logical axis "head"; did you mean "heads"'):
        two.spec(("embed", "head"))
    with pytest.raises(ValueError, match="two dimensions on the mesh axis tensor"):
        two.spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="rank 3 was given 2 logical axes"):
        two.sharding(("embed", "mlp"), rank=3)


MODEL = ModelConfig(vocab_size=64, num_layers=1, model_dim=24, num_heads=6, num_kv_heads=2, mlp_dim=48, max_length=8)


@pytest.mark.parametrize(
    ("axes", "batch", "message"),
    [
        ({}, 12, "batch.size 12 is not divisible by mesh data = 8; use 8 or 16"),
        ({"data": 4, "fsdp": 2}, 7, "batch.size 7 is not divisible by mesh data×fsdp = 8; use 8"),
        ({"tensor": 4, "data": 2}, 8, "model.num_kv_heads 2 is not divisible by mesh tensor = 4; use 4"),
        (
            {"tensor": 2, "context": 2, "data": 2},
            8,
            "mesh.context is 2, but it would shard nothing in this run; set it to 1",
        ),
        ({"stage": 2}, 8, "mesh.stage is 2, but it would shard nothing"),
        ({"expert": 8}, 8, "mesh.expert is 8, but it would shard nothing"),
    ],
)
def test_what_the_mesh_cannot_cut_is_refused_with_numbers_that_would_do(axes, batch, message):
    with pytest.raises(UserError, match=re.escape(message)):
        layout(**axes).check(build(MODEL).abstract, batch)


def test_width_and_microbatches_must_divide_too():
    model = ModelConfig(vocab_size=64, num_layers=1, model_dim=36, num_heads=4, max_length=8)
    with pytest.raises(
        UserError, match=re.escape("model.model_dim 36 is not divisible by mesh fsdp = 8; use 32 or 40")
    ):
        layout(fsdp=8, data=1).check(build(model).abstract, 16)
    with pytest.raises(
        UserError, match=re.escape("batch.size 16 in 4 microbatches is not divisible by mesh data = 8; use 32")
    ):
        layout().check(build(MODEL).abstract, 16, microbatches=4)


def test_parameters_lie_where_the_rules_say():
    abstract = build(MODEL).abstract
    shardings = layout(fsdp=4, tensor=2, data=1).param_shardings(abstract)
    block = shardings["decoder"]["stack"]["block"]
    assert block["attention"]["query"]["kernel"].spec == P(None, ("fsdp",), ("tensor",), None)
    assert block["mlp"]["down"]["kernel"].spec == P(None, ("tensor",), ("fsdp",))
    assert block["mlp"]["down"]["bias"].spec == P(None, None)
    assert shardings["embed"]["table"].spec == P(("tensor",), ("fsdp",))


def test_a_batch_becomes_global_arrays():
    two = layout(data=2, fsdp=2, tensor=2)
    assert two.local_rows(8) == range(0, 8)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    array = two.global_batch({"tokens": rows}, 8)["tokens"]
    np.testing.assert_array_equal(array, rows)
    assert array.sharding.shard_shape(array.shape) == (2, 3)


def test_constrain_places_activations_only_inside_use():
    x = jax.numpy.zeros((8, 4))
    assert mesh.constrain(x, "batch", None) is x
    with mesh.use(layout()):
        placed = jax.jit(lambda x: mesh.constrain(x, "batch", None))(x)
    assert placed.sharding.spec[0] is not None
    assert mesh.batch_parts() == 1


def test_one_key_value_head_serves_every_part():
    model = build(dataclasses.replace(MODEL, num_kv_heads=1))
    layout = mesh.make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    layout.check(model.abstract, 8)
    attention = model.abstract["decoder"]["stack"]["block"]["attention"]
    assert attention["key"]["kernel"].axes[-2] is None
    assert attention["query"]["kernel"].axes[-2] == "heads"
