"""A generator beside its discriminator: what they share, what is whose, how both are kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxpretrain import mesh
from maxpretrain.config import MeshConfig
from maxpretrain.fingerprint import named_leaves
from maxpretrain.models import build, families
from maxpretrain.models.families import bert_like
from maxpretrain.models.paired import Paired
from maxpretrain.nn.base import is_spec
from maxpretrain.nn.stack import Execution
from maxpretrain.objectives import ELECTRA, RTD

TABLES = ("embed/table", "encoder/input/positions/table", "encoder/input/token_types/table")
SHAPE = bert_like.shape(
    vocab_size=40,
    num_layers=2,
    model_dim=16,
    num_heads=4,
    mlp_dim=32,
    embed_dim=8,
    max_length=16,
    token_types=2,
    heads=("replaced",),
    dropout=0.0,
)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def drawn(model, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda spec: jnp.asarray(0.3 * rng.standard_normal(spec.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, model.abstract, is_leaf=is_spec)


def made(objective, config=SHAPE):
    model = objective.build(config)
    return model, drawn(model)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_generator_lacks_what_it_shares():
    model, params = made(ELECTRA())
    own = named_leaves(params["generator"])
    assert set(own).isdisjoint(TABLES)
    assert set(own) | set(TABLES) == set(named_leaves(model.generator.abstract))
    assert set(named_leaves(params)) - {f"generator/{name}" for name in own} == set(named_leaves(build(SHAPE).abstract))
    seen = named_leaves(model.generator_params(params))
    assert all(seen[name] is named_leaves(params)[name] for name in TABLES)
    # A quarter of the width, heads and MLP, as deep, with the discriminator's embedding.
    config = model.generator.config
    assert (config.model_dim, config.num_heads, config.mlp_dim, config.num_layers) == (4, 1, 8, 2)
    assert config.embed_width == 8
    assert config.heads == ("lm",)


def test_published_counts():
    """Published networks, less what they share."""
    base = dataclasses.replace(ELECTRA(), generator_share=1 / 3)
    pair = base.build(families.preset("electra-base"))
    assert dataclasses.replace(pair.generator.config, pooler_activation="gelu") == families.preset(
        "electra-base-generator"
    )
    # 109,483,009 and 33,740,602 less 30,522 tokens, 512 positions and 2 types of width 768.
    assert count(pair.abstract) == 119_387_963
    # The paper's small generator is of width 64; the released one, as wide as the discriminator, is a share of 1.
    assert count(ELECTRA().build(families.preset("electra-small")).abstract) == 13_549_057 + 647_418
    released = ELECTRA(generator_share=1.0).build(families.preset("electra-small"))
    assert released.generator.config == families.preset("electra-small-generator")


def test_a_generator_of_half_the_depth_and_a_table_of_differences():
    config = dataclasses.replace(families.preset("deberta-v3-base"), heads=("replaced",))
    model = RTD().build(config)
    assert (model.generator.config.num_layers, model.generator.config.model_dim) == (6, 768)
    assert model.generator.config.embed_dim is None
    assert model.tables == ("embed/table",)
    # Of 184,551,780 the head (590,592 + 1,536 + 128,100) goes and one for replaced tokens (591,361) comes; the generator has
    # that head, six layers of 7,087,872 fewer, and 512 absolute positions for the mask decoder.
    discriminator = 184_551_780 - 720_228 + 591_361
    generator = 184_551_780 - 6 * 7_087_872 + 512 * 768
    assert count(model.abstract) == 326_840_677
    assert count(model.abstract) == discriminator + generator


KINDS = {"shared": ELECTRA(), "none": ELECTRA(sharing="none"), "disentangled": RTD()}


@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_the_plain_network_is_the_discriminator(objective):
    """Whatever is kept how: the pair's own outputs are those of a plain network with the plain parameters."""
    model, params = made(objective)
    plain = model.plain(params)
    assert jax.tree.structure(plain) == jax.tree.structure(jax.eval_shape(build(SHAPE).init, jax.random.key(0)))
    assert model.plain(plain) is plain
    ask = lambda model, params: jax.jit(model.apply)(params, TOKENS).hidden  # noqa: E731
    expected = ask(build(SHAPE), plain)
    for given in (params, plain):
        np.testing.assert_array_equal(ask(model, given), expected)
    hidden = jnp.ones((2, 3, 16), jnp.float32)
    said = model.head_outputs(params, hidden)["replaced_logits"]
    np.testing.assert_array_equal(said, build(SHAPE).head_outputs(plain, hidden)["replaced_logits"])


def test_the_discriminator_begins_with_the_generators_tables():
    model = RTD().build(SHAPE)
    params = jax.jit(model.init)(jax.random.key(3))
    assert set(model.tables) == set(TABLES)
    leaves = named_leaves(params)
    for name in TABLES:
        assert not np.any(leaves[name])
        assert np.any(leaves[f"generator/{name}"])
        np.testing.assert_array_equal(named_leaves(model.plain(params))[name], leaves[f"generator/{name}"])


def test_tables_of_their_own():
    model, params = made(ELECTRA(sharing="none"))
    assert model.tables == ()
    assert params["generator"]["embed"]["table"].shape == (40, 4)  # as wide as the generator
    assert model.generator_params(params) is params["generator"]


@pytest.mark.parametrize("objective", KINDS.values(), ids=KINDS)
def test_a_plain_network_is_adopted(objective):
    model, fresh = made(objective)
    plain = drawn(build(SHAPE), 9)
    params = model.adopted(plain, fresh)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    back = named_leaves(model.plain(params))
    for name, leaf in named_leaves(plain).items():
        np.testing.assert_allclose(back[name], leaf, atol=1e-7, err_msg=name)
    np.testing.assert_array_equal(params["generator"]["lm"]["bias"], fresh["generator"]["lm"]["bias"])


def test_tables_that_do_not_fit():
    generator = dataclasses.replace(ELECTRA().generator(SHAPE), max_length=32)
    with pytest.raises(ValueError, match=r"positions/table has shape \(16, 8\) and, in the generator, \(32, 8\)"):
        Paired(SHAPE, generator, Execution())


def test_every_leaf_has_a_place_on_a_mesh():
    layout = mesh.make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    config = dataclasses.replace(SHAPE, model_dim=32, num_heads=8)
    for objective in (ELECTRA(), RTD()):
        abstract = objective.build(config).abstract
        layout.check(abstract, 8)
        places = named_leaves(layout.param_shardings(abstract))
        assert places["generator/encoder/stack/block/mlp/up/kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
