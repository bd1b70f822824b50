"""`generate` on run directories whose objective says how a prompt is read: answered, continued, or its masks filled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxpretrain as mp
from maxpretrain import cli, configio
from maxpretrain.checkpoint import Checkpoints
from maxpretrain.config import EvaluationConfig, ModelConfig, Run, TokenizerConfig
from maxpretrain.data.tokenizer import Characters
from maxpretrain.nn.base import is_spec
from maxpretrain.objectives import CLM, ELECTRA, RTD, Mixture, SpanCorruption
from maxpretrain.train.samples import Sampler
from maxpretrain.vocabulary import sentinels

LETTERS = Characters("abcdefghijklmnopqrstuvwxyz .", ["</s>", "<mask>"], sentinels(3))
MODEL = ModelConfig(
    vocab_size=LETTERS.vocab_size, num_layers=1, model_dim=16, num_heads=2, position="rope", max_length=64
)
ENCODER = dataclasses.replace(MODEL, architecture="encoder", heads=("replaced",))


def make_run(root, name, objective, model=MODEL):
    rng = np.random.default_rng(2)
    draw = lambda s: jnp.asarray((s.role == "norm") + 0.5 * rng.standard_normal(s.shape), jnp.float32)  # noqa: E731
    path = root / name
    path.mkdir()
    config = Run(
        name=name, root=str(root), model=model, objective=objective, tokenizer=TokenizerConfig(kind="characters")
    )
    (path / "config.json").write_text(configio.to_json(config))
    LETTERS.save(path / "tokenizer")
    params = jax.tree.map(draw, objective.build(model).abstract, is_leaf=is_spec)
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": params, "step": jnp.asarray(1, jnp.int32)}, {}, final=True)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    spans = SpanCorruption(decoder_format="prefix")
    return {
        "spans": make_run(root, "spans", spans),
        "both": make_run(root, "both", Mixture(objectives=(CLM(), spans))),
        "electra": make_run(root, "electra", ELECTRA(generator_share=0.5), ENCODER),
        "rtd": make_run(root, "rtd", RTD(generator_share=0.5, generator_depth=1.0), ENCODER),
    }


def said(capsys, *words):
    status = cli.main(["generate", *map(str, words), "--temperature", "0", "--max-new-tokens", "8"])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_a_prompt_with_a_sentinel_is_filled_and_another_continued(runs, capsys):
    status, text = said(capsys, runs["both"], "--prompt", "the <extra_id_0> sat")
    assert status == 0
    assert text.startswith("the ")  # the text itself, whatever stands in the place of the sentinel
    assert text.rstrip("\n").endswith(" sat")
    status, text = said(capsys, runs["both"], "--prompt", "the")
    assert status == 0
    assert text.startswith("the")
    loaded = mp.load(runs["both"])
    assert (loaded.answers("the <extra_id_1>"), loaded.answers("the")) == (True, False)
    # Together each is what it is alone.
    prompts = ["the <extra_id_0> sat", "the"]
    assert loaded.generate(prompts, 8) == [loaded.generate([prompt], 8)[0] for prompt in prompts]
    assert mp.load(runs["spans"]).answers("the")


def test_a_suffix_for_an_answer_is_refused(runs, capsys):
    status, text = said(capsys, runs["spans"], "--prompt", "the <extra_id_0>", "--suffix", " sat")
    assert status == 2
    assert "it answers this one; leave it out" in text


@pytest.mark.parametrize("name", ["electra", "rtd"])
def test_a_generator_fills_masks(runs, capsys, name):
    status, text = said(capsys, runs[name], "--prompt", "the c<mask>t")
    assert status == 0
    assert text.startswith("the c")
    assert "mask 1: " in text
    (masks,) = mp.load(runs[name]).fill(["the c<mask>t"], top_k=3)
    assert len(masks[0]) == 3


def test_all_parameters_are_counted(runs):
    loaded = mp.load(runs["electra"])
    network = loaded.config.objective.build(loaded.config.model)
    assert network.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    assert network.num_parameters > mp.models.parameter_count(loaded.config.model)  # which is of the discriminator


def test_samples_of_a_report(runs):
    def samples(name, *prompts):
        loaded = mp.load(runs[name])
        evaluation = EvaluationConfig(prompts=prompts, sample_tokens=6)
        objective = loaded.config.objective
        return Sampler(objective.build(loaded.config.model), LETTERS, evaluation, 0, objective)(loaded.params)

    (one,) = samples("electra", "the c<mask>t", "no mask")
    assert one[0] == "the c<mask>t"
    assert one[1].startswith(" → the c")
    filled, continued = samples("both", "the <extra_id_0> sat", "the")
    assert filled[1].startswith(" → the ")
    assert filled[1].endswith(" sat")
    assert not continued[1].startswith(" → ")
    ((_, text),) = samples("spans", "the <extra_id_0> sat")
    assert text.startswith(" → the ")
    assert text.endswith(" sat")
