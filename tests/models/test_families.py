"""Every family against its reference class: outputs, loss and gradients of tiny random models, made by
tests/golden/make_families.py; and the numbers of parameters that are published."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxpretrain.convert import tensors
from maxpretrain.convert.exporting import export
from maxpretrain.convert.mapping import Mapping, as_tree
from maxpretrain.models import build, families, parameter_count
from maxpretrain.models.families.options import Options
from maxpretrain.nn.stack import Execution
from maxpretrain.rundir import RunDirectory

GOLDENS = sorted((Path(__file__).parents[1] / "golden" / "families").glob("*.npz"))


def config_of(golden):
    options = Options(json.loads(str(golden["config"])))
    family = families.by_type(options.model_type)
    if family is None:
        pytest.fail(f"no family for {options.model_type}")
    labels = options.raw.get("id2label")
    config = family.from_options(options)
    config = dataclasses.replace(config, heads=family.CLASSES[str(golden["architecture"])])
    if labels and {"sequence", "token"} & set(config.heads):
        config = dataclasses.replace(config, num_labels=len(labels))
    return family, config


def renamed(family, name):
    kind, _, tensor = name.partition("/")
    for pattern, new in getattr(family, "RENAMED", ()):
        tensor = re.sub(pattern, new, tensor)
    return f"{kind}/{tensor}" if tensor else name


def inputs_of(golden):
    mask = golden["mask"].astype(np.int32)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    inputs = {"tokens": golden["ids"].astype(np.int32), "segments": mask, "positions": positions}
    if "token_types" in golden:
        inputs["token_types"] = golden["token_types"].astype(np.int32)
    if "decoder_ids" in golden:
        inputs["decoder_tokens"] = golden["decoder_ids"].astype(np.int32)
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def answers(model, params, inputs):
    """All that the model says, under the names of the goldens."""
    output = model.apply(params, **inputs)
    heads = model.head_outputs(params, output.hidden, inputs["segments"] != 0)
    said = {"hidden": output.hidden} | heads
    if output.memory is not None:
        said["encoder_hidden"] = output.memory
    if "lm" in model.config.heads:
        said["logits"] = model.logits(params, output.hidden)
    return said


def cross_entropy(logits, labels):
    """Mean over labels that are no −100."""
    asked = labels != -100
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(scores, jnp.where(asked, labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(asked, chosen, 0.0)) / jnp.sum(asked.astype(jnp.float32))


def loss_of(model, golden, said):
    labels = jnp.asarray(golden["labels"], jnp.int32)
    if "replaced_logits" in golden:
        logits, asked = said["replaced_logits"], labels != -100
        each = jnp.logaddexp(0.0, logits) - jnp.where(asked, labels, 0).astype(jnp.float32) * logits
        return jnp.sum(jnp.where(asked, each, 0.0)) / jnp.sum(asked.astype(jnp.float32))
    for head in ("sequence_logits", "token_logits"):
        if head in golden:
            return cross_entropy(said[head], labels)
    if model.config.architecture == "decoder":
        return cross_entropy(said["logits"][:, :-1], labels[:, 1:])
    loss = cross_entropy(said["logits"], labels)
    if "pair_labels" in golden:
        loss = loss + cross_entropy(said["pair_logits"], jnp.asarray(golden["pair_labels"], jnp.int32))
    return loss


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_equals_the_reference(path):
    with np.load(path) as file:
        check(dict(file))


def check(golden):
    family, config = config_of(golden)
    model = build(config)
    mapping = Mapping(model, family.names(config))
    golden = {renamed(family, name): value for name, value in golden.items()}
    weights = {name.removeprefix("weights/"): value for name, value in golden.items() if name.startswith("weights/")}
    assert {tensor.theirs for tensor in mapping.tensors} == set(weights)
    params = as_tree({name: jnp.asarray(value) for name, value in mapping.load(weights.__getitem__, "golden")})
    inputs = inputs_of(golden)

    def objective(params):
        said = answers(model, params, inputs)
        return loss_of(model, golden, said), said

    (loss, said), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    for name in sorted(said.keys() & golden.keys()):
        expected, got = golden[name], np.asarray(said[name])
        real = np.ones(got.shape[:1], bool)
        if got.ndim > 1 and got.shape[1] == golden["mask"].shape[1] and name not in ("pooled",):
            real = golden["mask"].astype(bool)
        if name in ("logits", "hidden") and "decoder_ids" in golden:
            real = golden.get("decoder_mask", np.ones_like(golden["decoder_ids"])).astype(bool)
        np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=2e-5, err_msg=name)
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)
    gradients = {name: make for name, _, make in mapping.store(grads)}
    for name in [name for name in golden if name.startswith("grad/")]:
        expected, got = golden[name], gradients[name.removeprefix("grad/")]()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name)

    for name, shape, make in mapping.store(params):  # out again: the same file
        assert shape == weights[name].shape
        np.testing.assert_array_equal(make(), weights[name].astype(np.float32), err_msg=name)
    back = family.from_options(Options(json.loads(json.dumps(family.to_options(config)))))
    assert dataclasses.replace(back, heads=config.heads, num_labels=config.num_labels) == config


@pytest.mark.parametrize("path", GOLDENS[::4], ids=lambda path: path.stem)
def test_bfloat16_says_about_the_same(path):
    with np.load(path) as file:
        golden = dict(file)
    family, config = config_of(golden)
    model = build(config, Execution(dtype="bfloat16"))
    golden = {renamed(family, name): value for name, value in golden.items()}
    weights = {name.removeprefix("weights/"): value for name, value in golden.items() if name.startswith("weights/")}
    mapping = Mapping(model, family.names(config))
    params = as_tree({name: jnp.asarray(value) for name, value in mapping.load(weights.__getitem__, "golden")})
    said = jax.jit(lambda p: answers(model, p, inputs_of(golden)))(params)
    assert float(loss_of(model, golden, said)) == pytest.approx(float(golden["loss"]), rel=0.05)


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_families", GOLDENS[0].parents[1] / "make_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.transformers.utils.logging.disable_progress_bar()
    return module


@pytest.mark.parity
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_the_reference_again_from_another_seed_and_out_to_it(path, maker, monkeypatch, tmp_path):
    with np.load(path) as file:
        committed = dict(file)
    again, _ = maker.golden(path.stem)
    for name, value in committed.items():
        if value.dtype == np.float32:
            np.testing.assert_allclose(again[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    monkeypatch.setattr(maker, "SEED", maker.SEED + 1)
    other, _ = maker.golden(path.stem)
    check(other)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(str(other["config"]))
    weights = {n.removeprefix("weights/"): v for n, v in other.items() if n.startswith("weights/")}
    tensors.write(source, [(n, v.shape, v.dtype, lambda v=v: v) for n, v in weights.items()])
    found = export(RunDirectory.open(source), tmp_path / "out")
    assert found["class"] == str(other["architecture"])
    assert found["ours"]["max_difference"] == 0.0
    assert found["transformers"]["max_difference"] < 2e-5
    assert found["transformers"]["agreement"] == 1.0


COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "roberta-base": 124_697_433,
    "albert-base-v2": 11_813_810,
    "electra-small": 13_549_057,
    "electra-base": 109_483_009,
    "electra-base-generator": 33_740_602,
    "deberta-v3-base": 184_551_780,
    "modernbert-base": 149_655_232,
    "t5-small": 60_506_624,
    "t5-v1.1-small": 76_961_152,
    "t5-base": 222_903_552,
    "bart-base": 139_420_416,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-3-1b": 999_885_952,
    "mixtral-8x7b": 46_702_792_704,
    "olmo2-7b": 7_298_617_344,
    "deepseek-v3": 671_026_404_352,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_number_of_parameters(name):
    assert parameter_count(families.preset(name)) == COUNTS[name]


def test_all_presets_can_be_built_and_exported():
    for family in families.FAMILIES.values():
        for name, config in family.PRESETS.items():
            model = build(config)
            if hasattr(family, "MODEL_TYPE"):
                assert config.heads in family.CLASSES.values(), name
                Mapping(model, family.names(config))
                back = family.from_options(Options(json.loads(json.dumps(family.to_options(config)))))
                trained = {f: getattr(config, f) for f in ("heads", "num_labels", "init", "depth_scaled_init")}
                assert dataclasses.replace(back, **trained) == config, name
