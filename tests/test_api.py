"""A run directory in Python: loaded, asked, evaluated; and what `import maxpretrain` costs and offers."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxpretrain as mp
from maxpretrain import configio
from maxpretrain.checkpoint import Checkpoints
from maxpretrain.config import BatchConfig, ComputeConfig, DataConfig, MeshConfig, ModelConfig, Run, TokenizerConfig
from maxpretrain.data.tokenizer import Characters
from maxpretrain.errors import StorageError, UserError
from maxpretrain.models import build
from maxpretrain.nn.base import is_spec
from maxpretrain.rundir import RunDirectory

TEXT = "a cat sat. a bat sat. that cat sat at a bat, a fat cat. " * 8
TOKENIZER = Characters(TEXT)


def draw(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray((s.role == "norm") + 0.5 * rng.standard_normal(s.shape), jnp.float32),
        model.abstract,
        is_leaf=is_spec,
    )


def make_run(root, name, **model):
    """The run directory that training leaves, with checkpoints of steps 3 and 5."""
    text = root / "text.txt"
    text.write_text(TEXT)
    config = Run(
        name=name,
        root=str(root),
        model=ModelConfig(num_layers=1, model_dim=8, num_heads=2, vocab_size=TOKENIZER.vocab_size + 3, **model),
        tokenizer=TokenizerConfig(kind="characters"),
        data=DataConfig(
            train=(str(text),), split="tail", validation_fraction=0.25, cache=str(root / "cache"), workers=1
        ),
        batch=BatchConfig(size=6, length=16),
        compute=ComputeConfig(dtype="float32"),
    )
    path = root / name
    path.mkdir()
    (path / "config.json").write_text(configio.to_json(config))
    TOKENIZER.save(path / "tokenizer")
    network = build(config.model)
    with Checkpoints(path / "checkpoints") as checkpoints:
        for step in (3, 5):
            state = {"params": draw(network, step), "step": jnp.asarray(step, jnp.int32)}
            checkpoints.save(step, state, {}, final=True)
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return mp.load(make_run(tmp_path_factory.mktemp("runs"), "learned", max_length=20))


@pytest.fixture(scope="module")
def rotary(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return mp.load(str(make_run(root, "rotary", position="rope", norm="rmsnorm", max_length=20)))


def test_what_a_loaded_run_has(learned):
    assert isinstance(learned.config, mp.Run)
    assert learned.config.model.max_length == 20
    assert learned.step == 5
    assert learned.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert learned.params["stack"]["block"]["attention"]["query"]["kernel"].shape == (1, 8, 2, 4)
    assert mp.load(learned.directory.path, step=3).params["norm"]["scale"][0] != learned.params["norm"]["scale"][0]


def test_logits_and_outputs(learned):
    tokens = np.arange(10).reshape(2, 5) % 7
    logits = learned.logits(tokens)
    assert (logits.shape, logits.dtype) == ((2, 5, TOKENIZER.vocab_size + 3), np.float32)
    out = learned.outputs(jnp.asarray(tokens))
    assert out.keys() == {"hidden", "logits"}
    np.testing.assert_array_equal(out["logits"], logits)
    np.testing.assert_allclose(out["hidden"] @ learned.params["embed"]["table"].T, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(learned.logits(tokens.tolist()), logits)


@pytest.mark.parametrize("which", ["learned", "rotary"])
def test_padding_on_either_side_changes_nothing(which, request):
    run = request.getfixturevalue(which)
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, 7, (1, 9)), rng.integers(0, 7, (1, 5))
    right = np.concatenate([short, np.full((1, 4), 6)], 1)
    left = np.concatenate([np.full((1, 4), 6), short], 1)
    mask = np.array([[1] * 9, [1] * 5 + [0] * 4, [0] * 4 + [1] * 5])
    together = run.logits(np.concatenate([long, right, left]), mask)
    alone = run.logits(np.concatenate([long, right]))
    for found, expected in ((together[0], alone[0]), (together[1, :5], alone[1, :5]), (together[2, 4:], alone[1, :5])):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    other = np.where(mask[:, :] == 0, 2, np.concatenate([long, right, left]))
    np.testing.assert_array_equal(run.logits(other, mask)[mask == 1], together[mask == 1])
    assert np.isfinite(together).all()


def test_a_mask_may_lie_longer_than_the_positions(learned):
    tokens = np.zeros((1, 30), np.int32)
    mask = np.arange(30)[None] >= 12
    np.testing.assert_allclose(
        learned.logits(tokens, mask)[0, 12:], learned.logits(tokens[:, :18])[0], rtol=1e-4, atol=1e-5
    )


def test_input_that_does_not_fit(learned):
    for tokens, mask, message in (
        ([1, 2], None, r"tokens are int64 of shape \(2,\); give integers of shape \[batch, length\]"),
        ([[0.5]], None, "tokens are float64"),
        ([[0, 16]], None, f"tokens hold the id 16; the model's vocabulary is 0 to {TOKENIZER.vocab_size + 2}"),
        ([[0, -1]], None, "tokens hold the id -1"),
        ([[0, 1]], [[1]], r"the mask has shape \(1, 1\) and tokens \(1, 2\)"),
        ([[0, 1]], [[1, 2]], "give 1 for each real token and 0 for padding"),
        ([[0] * 21], None, "21 tokens in a row are more than the 20 positions that the model learned"),
    ):
        with pytest.raises(UserError, match=message):
            learned.logits(tokens, mask)
    with pytest.raises(UserError, match="token_types were given, and a decoder has none"):
        learned.outputs([[0]], token_types=[[0]])
    with pytest.raises(UserError, match="prompts is one text; give a list of them"):
        learned.generate("a cat")


def test_generate_follows_the_logits(rotary):
    text = rotary.generate(["a cat"], max_new_tokens=6)[0]
    ids = TOKENIZER.encode("a cat" + text)
    likeliest = rotary.logits(ids[None, :-1])[0, 4:, : TOKENIZER.vocab_size].argmax(-1)
    assert likeliest.tolist() == ids[5:].tolist()
    pieces = []
    assert mp.generate(rotary, ["a cat"], 6, stream=lambda _, piece: pieces.append(piece)) == [text]
    assert "".join(pieces) == text


def nll(run, text):
    """Mean nats per character and accuracy, windows of 16, by the logits."""
    ids = TOKENIZER.encode(text)
    losses, hits = [], []
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        padded = np.pad(window[:-1], (0, 17 - len(window)))  # at the end, where nobody looks
        logits = run.logits(padded[None])[0, : len(window) - 1].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += (-log_p[np.arange(len(window) - 1), window[1:]]).tolist()
        hits += (log_p.argmax(-1) == window[1:]).tolist()
    return np.mean(losses), np.mean(hits)


def test_evaluate_on_the_validation_text_and_on_another(learned, tmp_path):
    own = mp.evaluate(learned)
    tail = TEXT[-len(TEXT) // 4 :]
    loss, accuracy = nll(learned, tail)
    assert list(own) == ["step", "loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "bytes"]
    assert (own["step"], own["tokens"], own["bytes"]) == (5, 112, 112)
    assert own["loss"] == pytest.approx(loss, rel=1e-5)
    assert own["accuracy"] == pytest.approx(accuracy, rel=1e-5)
    assert own["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)
    assert own["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)

    short = tmp_path / "short.txt"  # less than a window
    short.write_text("a fat bat")
    path = learned.directory.path
    other = mp.evaluate.evaluate_run(path, str(short), step=3)
    assert (other["step"], other["tokens"], other["bytes"]) == (3, 9, 9)
    assert other["loss"] == pytest.approx(nll(mp.load(path, step=3), "a fat bat")[0], rel=1e-5)

    silent = dataclasses.replace(learned, params=jax.tree.map(jnp.zeros_like, learned.params))
    assert mp.evaluate(silent, short)["loss"] == pytest.approx(math.log(TOKENIZER.vocab_size + 3), rel=1e-6)


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (MeshConfig(data=2, fsdp=4), {"data": 2, "fsdp": 4, "tensor": 1}),  # as trained
        (MeshConfig(data=1, fsdp=64), {"data": 1, "fsdp": 8, "tensor": 1}),  # more devices than are here: still cut
    ],
)
def test_evaluate_cuts_the_parameters_as_training_did(learned, tmp_path, mesh, expected):
    path = tmp_path / "cut"
    shutil.copytree(learned.directory.path, path)
    (path / "config.json").write_text(configio.to_json(learned.config.replace(mesh=mesh)))
    layout = sys.modules["maxpretrain.evaluate"]._layout(RunDirectory.open(path))
    assert {axis: layout.sizes[axis] for axis in expected} == expected
    assert mp.evaluate(path)["loss"] == pytest.approx(mp.evaluate(learned)["loss"], rel=1e-5)


def test_runs_and_checkpoints_that_are_not_there(learned, tmp_path, monkeypatch):
    path = learned.directory.path
    monkeypatch.chdir(path.parent.parent)
    with pytest.raises(UserError, match="no run quickstrat, here or under runs/"):
        mp.load("quickstrat")
    with pytest.raises(StorageError, match=r"has no checkpoint of step 4; there is: 3, 5"):
        mp.load(path, step=4)
    with pytest.raises(UserError, match="is not a run directory"):
        mp.load(tmp_path)
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(StorageError, match="has no complete checkpoint; train it first"):
        mp.load(tmp_path)
    with pytest.raises(UserError, match=r"not found|no such|matches no"):
        mp.evaluate(path, tmp_path / "nothing.txt")


def test_a_run_by_its_name(learned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(learned.directory.path.parent)
    assert mp.load("learned").step == 5
    with pytest.raises(UserError, match='no run lerned, here or under runs/; did you mean "learned"'):
        mp.load("lerned")


@pytest.mark.parametrize("content", [{"model_type": "gpt2"}, None])
def test_hugging_face_directories_are_named_as_such(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(b"")
    if content:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match="is a Hugging Face directory, and this version of maxpretrain does not read those"
    ):
        mp.load(tmp_path)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_is_light_and_names_come_when_asked_for():
    code = (
        "import sys, maxpretrain as mp; mp.Run, mp.config, mp.train, mp.objectives.CLM; "
        "print('jax' in sys.modules, 'numpy' in sys.modules); print(*sorted(set(mp.__all__) - set(dir(mp))), '-')"
    )
    assert python(code) == ["False", "False", "-"]
    assert mp.models.parameter_count(mp.models.families.llama.PRESETS["llama-3-8b"]) == 8_030_261_248
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        mp.nonsense  # noqa: B018


@pytest.mark.parametrize("name", ["evaluate", "generate", "plan", "train"])
def test_modules_that_are_functions_too(name, monkeypatch):
    """`mp.plan(config)` works whether or not `maxpretrain.plan` was imported, and however."""
    import importlib

    for module in (getattr(mp, name), importlib.import_module(f"maxpretrain.{name}")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda *args, **kwargs: (args, kwargs))
            assert getattr(mp, name)("config", target="h200") == (("config",), {"target": "h200"})
            assert module(1) == ((1,), {})
