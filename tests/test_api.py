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


def make_run(root, name, tokenizer=TOKENIZER, **model):
    """The run directory that training leaves, with checkpoints of steps 3 and 5."""
    text = root / "text.txt"
    text.write_text(TEXT)
    config = Run(
        name=name,
        root=str(root),
        model=ModelConfig(num_layers=1, model_dim=8, num_heads=2, vocab_size=tokenizer.vocab_size + 3, **model),
        tokenizer=TokenizerConfig(kind="characters", user_symbols=tokenizer.symbols),
        data=DataConfig(
            train=(str(text),), split="tail", validation_fraction=0.25, cache=str(root / "cache"), workers=1
        ),
        batch=BatchConfig(size=6, length=16),
        compute=ComputeConfig(dtype="float32"),
    )
    path = root / name
    path.mkdir()
    (path / "config.json").write_text(configio.to_json(config))
    tokenizer.save(path / "tokenizer")
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
    decoder = learned.params["decoder"]
    assert decoder["stack"]["block"]["attention"]["query"]["kernel"].shape == (1, 8, 2, 4)
    assert mp.load(learned.directory.path, step=3).params["decoder"]["norm"]["scale"][0] != decoder["norm"]["scale"][0]


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


MASKED = Characters(TEXT, ["<s>", "</s>", "[MASK]"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    shape = {"architecture": "encoder", "max_length": 20, "token_types": 2, "num_labels": 3, "lm_transform": True}
    heads = ("lm", "pooler", "pair", "replaced", "span_boundary", "sequence", "token", "value")
    return mp.load(make_run(tmp_path_factory.mktemp("runs"), "encoder", MASKED, heads=heads, **shape))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    shape = {"architecture": "encoder-decoder", "num_decoder_layers": 2, "max_length": 20, "decoder_start_id": 1}
    return mp.load(make_run(tmp_path_factory.mktemp("runs"), "both", MASKED, **shape))


def test_an_encoder_has_its_heads(encoder):
    rng = np.random.default_rng(1)
    tokens, types = rng.integers(0, 12, (2, 7)), rng.integers(0, 2, (2, 7))
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    out = encoder.outputs(tokens, mask, types)
    vocab = MASKED.vocab_size + 3
    shapes = {
        "hidden": (2, 7, 8),
        "logits": (2, 7, vocab),
        "pooled": (2, 8),
        "pair_logits": (2, 2),
        "replaced_logits": (2, 7),
    }
    shapes |= {"sequence_logits": (2, 3), "token_logits": (2, 7, 3), "values": (2, 7)}
    assert {name: value.shape for name, value in out.items()} == shapes
    assert {value.dtype for value in out.values()} == {np.dtype(np.float32)}
    alone = encoder.outputs(tokens[1:, :4], token_types=types[1:, :4])
    for name, value in out.items():
        found = value[1, :4] if value.shape[1] == 7 else value[1]
        np.testing.assert_allclose(found, alone[name][0], rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(encoder.logits(tokens, mask), encoder.outputs(tokens, mask)["logits"])
    assert not np.allclose(encoder.logits(tokens, mask), out["logits"])  # all of kind 0
    with pytest.raises(UserError, match=r"token_types are int64 of shape \(1, 2\); give integers of shape \(2, 7\)"):
        encoder.outputs(tokens, token_types=[[0, 1]])
    with pytest.raises(UserError, match="token_types hold 2; the model has 0 to 1"):
        encoder.outputs(tokens, token_types=types + 1)
    with pytest.raises(UserError, match="decoder_tokens was given without a network that has use for it"):
        encoder.outputs(tokens, decoder_tokens=tokens)


def test_an_encoder_fills_masks(encoder):
    texts = ["a [MASK]at", "[MASK] sat[MASK]"]
    found = encoder.fill(texts, top_k=3)
    assert [[len(candidates) for candidates in masks] for masks in found] == [[3], [3, 3]]
    ids = np.concatenate([[MASKED.bos_id], MASKED.encode(texts[0]), [MASKED.eos_id]])
    scores = encoder.logits(ids[None])[0, 3, : MASKED.vocab_size]
    assert [one.id for one in found[0][0]] == np.argsort(-scores)[:3].tolist()
    pieces = []
    filled = mp.generate(encoder, texts, stream=lambda *piece: pieces.append(piece))
    assert filled[0] == texts[0].replace("[MASK]", MASKED.decode([found[0][0][0].id]))
    assert pieces == [(0, filled[0]), (1, filled[1])]
    with pytest.raises(UserError, match=r'"a cat" has no mask; write \[MASK\]'):
        encoder.generate(["a cat"])
    with pytest.raises(UserError, match="texts is one text; give a list of them"):
        encoder.fill("a [MASK]")


def test_logits_of_an_encoder_decoder(both):
    rng = np.random.default_rng(2)
    tokens, decoder_tokens = rng.integers(3, 12, (2, 9)), rng.integers(3, 12, (2, 5))
    mask, decoder_mask = np.arange(9) < [[9], [6]], np.arange(5) < [[5], [4]]
    logits = both.logits(tokens, decoder_tokens, mask, decoder_mask)
    assert (logits.shape, logits.dtype) == ((2, 5, MASKED.vocab_size + 3), np.float32)
    alone = both.logits(tokens[1:, :6], decoder_tokens[1:, :4])
    np.testing.assert_allclose(logits[1, :4], alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        logits, both.logits(tokens, mask=mask, decoder_tokens=decoder_tokens, decoder_mask=decoder_mask)
    )
    left = both.logits(np.roll(tokens, 3, 1), decoder_tokens, np.roll(mask, 3, 1))[1]  # padding on the other side
    np.testing.assert_allclose(left[:4], alone[0], rtol=1e-4, atol=1e-5)
    out = both.outputs(tokens, mask, decoder_tokens=decoder_tokens, decoder_mask=decoder_mask)
    assert {name: value.shape for name, value in out.items()} == {
        "hidden": (2, 5, 8),
        "memory": (2, 9, 8),
        "logits": (2, 5, MASKED.vocab_size + 3),
    }
    encoded = both.outputs(tokens, mask)
    assert encoded.keys() == {"hidden"}
    np.testing.assert_allclose(encoded["hidden"], out["memory"], rtol=1e-5, atol=1e-6)
    for arrays, named, message in (
        ((), {}, r"needs decoder_tokens: run.logits\(tokens, decoder_tokens\)"),
        (
            (decoder_tokens,),
            {"decoder_tokens": decoder_tokens},
            "takes tokens, decoder_tokens, mask, decoder_mask, each once",
        ),
        ((decoder_tokens[:1],), {}, "tokens have 2 rows and decoder_tokens 1; give as many"),
        (([[0.5]],), {}, r"decoder_tokens are float64 of shape \(1, 1\)"),
        ((decoder_tokens, mask, mask), {}, r"the decoder_mask has shape \(2, 9\) and decoder_tokens \(2, 5\)"),
    ):
        with pytest.raises(UserError, match=message):
            both.logits(tokens, *arrays, **named)
    with pytest.raises(UserError, match="decoder_mask was given without decoder_tokens"):
        both.outputs(tokens, decoder_mask=decoder_mask)


def test_an_encoder_decoder_answers_by_its_logits(both):
    (text,) = both.generate(["a cat sat"], max_new_tokens=6)
    ids = np.concatenate([[1], MASKED.encode(text)])
    read = np.append(MASKED.encode("a cat sat"), MASKED.eos_id)
    likeliest = both.logits(read[None], ids[None])[0, :, : MASKED.vocab_size].argmax(-1)
    assert likeliest[:-1].tolist() == ids[1:].tolist()
    assert len(text) == 6 or likeliest[-1] == MASKED.eos_id


def test_without_heads_or_tokenizer(learned, encoder):
    bare = dataclasses.replace(learned, tokenizer=None)
    with pytest.raises(
        UserError, match=r"has no tokenizer, so texts mean nothing to it; use run.logits with token ids"
    ):
        bare.generate(["a"])
    assert bare.logits([[0, 1]]).shape == (1, 2, TOKENIZER.vocab_size + 3)
    shape = dataclasses.replace(encoder.config.model, heads=("pooler",), lm_transform=False)
    params = {name: part for name, part in encoder.params.items() if name != "lm"}
    directory = dataclasses.replace(encoder.directory, config=encoder.config.replace(model=shape))
    headless = dataclasses.replace(
        encoder, directory=directory, params=params | {"heads": {"pooler": params["heads"]["pooler"]}}
    )
    assert headless.outputs([[0, 1]]).keys() == {"hidden", "pooled"}
    with pytest.raises(UserError, match=r'model.heads are pooler; without "lm" there are no logits; use run.outputs'):
        headless.logits([[0, 1]])


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
    assert list(own) == ["step", "loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "bytes", "length"]
    parameters = sum(x.size for x in jax.tree.leaves(learned.params))
    assert repr(learned) == f"LoadedRun('{learned.directory.path}', step=5, {parameters:,} parameters, {TOKENIZER})"
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "nonsense"}, 'model_type "nonsense" is not supported; supported are'),
        (None, "is not a run directory: it has no config.json"),
    ],
)
def test_hugging_face_directories_that_are_none(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(b"")
    if content:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
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
