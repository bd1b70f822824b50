"""Directories of Hugging Face in and out: what is written, what is read, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import maxpretrain as mp
from maxpretrain import cli, configio
from maxpretrain.checkpoint import Checkpoints
from maxpretrain.config import BatchConfig, DataConfig, EvaluationConfig, ModelConfig, MoEConfig, Run, TokenizerConfig
from maxpretrain.convert import exporting, tensors
from maxpretrain.convert.exporting import export, find_target
from maxpretrain.convert.importing import import_directory
from maxpretrain.convert.published import open_published
from maxpretrain.data.tokenizer import Characters
from maxpretrain.errors import StorageError, UserError
from maxpretrain.models import build, families
from maxpretrain.rundir import RunDirectory

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
TOKENIZER = Characters("the cat sat on a mat and that was that. ")
MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    mlp_dim=24,
    max_length=32,
    position="rope",
    norm="rmsnorm",
    activation="silu",
    gated=True,
    bias=False,
)


def published(name: str, directory: Path) -> Path:
    """A golden as the directory it was taken from."""
    directory.mkdir()
    with np.load(GOLDEN / f"{name}.npz") as golden:
        (directory / "config.json").write_text(str(golden["config"]))
        weights = {n.removeprefix("weights/"): golden[n] for n in golden.files if n.startswith("weights/")}
    tensors.write(directory, [(n, v.shape, v.dtype, lambda v=v: v) for n, v in weights.items()])
    return directory


def make_run(root: Path, name: str, model: ModelConfig) -> Path:
    path = root / name
    path.mkdir()
    run = Run(name=name, root=str(root), model=model, tokenizer=TokenizerConfig(kind="characters"))
    (path / "config.json").write_text(configio.to_json(run))
    TOKENIZER.save(path / "tokenizer")
    with Checkpoints(path / "checkpoints") as checkpoints:
        state = {"params": jax.jit(build(model).init)(jax.random.key(3)), "step": jnp.asarray(7, jnp.int32)}
        checkpoints.save(7, state, {}, final=True)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs"), "llama-like", MODEL)


@pytest.fixture
def llama(tmp_path):
    return published("llama-mha", tmp_path / "llama")


def test_an_export_is_read_back_as_the_same_network(run, tmp_path):
    result = export(RunDirectory.open(run), tmp_path / "out")
    assert result["class"] == "LlamaForCausalLM"
    assert (result["ours"]["max_difference"], result["ours"]["kl"], result["ours"]["agreement"]) == (0.0, 0.0, 1.0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    ours, back = mp.load(run), mp.load(tmp_path / "out")
    tokens = np.arange(12)[None] % TOKENIZER.vocab_size
    np.testing.assert_array_equal(ours.logits(tokens), back.logits(tokens))
    assert back.tokenizer.encode("the cat").tolist() == TOKENIZER.encode("the cat").tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing half-made beside it
    export(RunDirectory.open(run), tmp_path / "out")  # its own kind is replaced


def test_bfloat16_files_are_close(run, tmp_path):
    found = export(RunDirectory.open(run), tmp_path / "out", dtype="bfloat16")["ours"]
    assert 0 < found["max_difference"] < 0.05
    with tensors.TensorFiles.open(tmp_path / "out") as files:
        assert files.dtype("model.norm.weight") == ml_dtypes.bfloat16


def test_a_shape_that_no_class_has_is_refused_with_the_nearest(tmp_path):
    odd = make_run(tmp_path, "odd", dataclasses.replace(MODEL, gated=False))
    with pytest.raises(
        UserError, match=r"nearest is LlamaForCausalLM, which differs in model\.gated \(True, not False\)"
    ):
        export(RunDirectory.open(odd), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_noise_of_training_is_left_out_of_an_export(tmp_path):
    moe = MoEConfig(num_experts=4, top_k=2, expert_dim=16, noisy=True)
    noisy = make_run(tmp_path, "noisy", dataclasses.replace(MODEL, moe=moe))
    assert export(RunDirectory.open(noisy), tmp_path / "out")["class"] == "MixtralForCausalLM"
    tokens = np.arange(12)[None] % TOKENIZER.vocab_size
    np.testing.assert_array_equal(mp.load(noisy).logits(tokens), mp.load(tmp_path / "out").logits(tokens))


def test_an_export_that_somebody_added_to_is_left_alone(run, tmp_path):
    out = tmp_path / "out"
    export(RunDirectory.open(run), out)
    (out / "README.md").write_text("my model card")
    with pytest.raises(UserError, match="holds something that no export of ours made, or that changed since"):
        export(RunDirectory.open(run), out)
    assert (out / "README.md").read_text() == "my model card"


def test_an_export_that_reads_back_otherwise_is_no_export(run, tmp_path, monkeypatch):
    found = {"max_difference": 5.0, "scale": 6.0, "kl": 1.0, "agreement": 0.3}
    monkeypatch.setattr(exporting, "_compare_ours", lambda *_: found)
    with pytest.raises(StorageError, match="what ours reads back differs by 5 in a logit"):
        export(RunDirectory.open(run), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_mup_scales_has_no_place_in_a_published_file():
    wide = dataclasses.replace(MODEL, mup_base=8)
    with pytest.raises(UserError, match=r"differs in model\.logit_scale"):
        find_target(wide)


def test_a_directory_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something that no export of ours made"):
        export(RunDirectory.open(run), tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "name", [name for f in families.FAMILIES.values() if hasattr(f, "MODEL_TYPE") for name in f.PRESETS]
)
def test_every_preset_finds_its_own_class(name):
    config = families.preset(name)
    own = next(f for f in families.FAMILIES.values() if name in f.PRESETS)
    target = find_target(config)
    # Some families are special cases of others: what matters is that the class found says the same.
    assert target.family is own or target.family.from_options
    assert config.heads == target.family.CLASSES[target.class_name]


def test_an_import_is_a_run(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["import", str(llama), "mine"]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    ours, theirs = mp.load("mine"), mp.load(llama)
    tokens = np.arange(10)[None] + 5
    np.testing.assert_array_equal(ours.logits(tokens), theirs.logits(tokens))
    assert theirs.tokenizer is None
    with pytest.raises(UserError, match="exists; give the run another name"):
        import_directory(llama, "mine")


def test_training_goes_on_from_published_weights(run, tmp_path):
    exported = tmp_path / "out"
    export(RunDirectory.open(run), exported)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat and that was that. " * 40)
    config = Run(
        name="more",
        root=str(tmp_path / "runs"),
        init_from=str(exported),
        steps=3,
        data=DataConfig(
            train=(str(text),), split="tail", validation_fraction=0.2, cache=str(tmp_path / "cache"), workers=1
        ),
        batch=BatchConfig(size=8, length=16),
        evaluation=EvaluationConfig(every=0, prompts=()),
    )
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            config.optimizer, schedule=dataclasses.replace(config.optimizer.schedule, warmup=1)
        ),
    )
    path = mp.train(config)
    first = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
    saved = RunDirectory.open(path)
    assert saved.config.model.num_layers == 2
    assert saved.tokenizer.encode("mat").tolist() == TOKENIZER.encode("mat").tolist()
    assert "first parameters: " in (path / "log.txt").read_text()
    # An untrained step would begin at another loss: these are the exported weights.
    start = mp.load(exported)
    store_loss = start.logits(np.asarray(TOKENIZER.encode("the cat sat on a mat"))[None])
    assert np.isfinite(store_loss).all()
    assert first["train/loss"] == pytest.approx(np.log(TOKENIZER.vocab_size), rel=0.05)
    shutil.rmtree(exported)  # going on needs nothing of where it began, nor of the cache
    shutil.rmtree(tmp_path / "cache")
    assert mp.train(config.replace(steps=4)) == path
    saved = RunDirectory.open(path)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), saved.params(), start.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.02  # three small steps away, not somewhere else


def edit(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "gone"}))


def rewrite(directory: Path, change) -> None:
    with tensors.TensorFiles.open(directory) as files:
        held = {name: np.array(files.read(name)) for name in files.names()}
    change(held)
    (directory / "model.safetensors").unlink()
    tensors.write(directory, [(n, v.shape, v.dtype, lambda v=v: v) for n, v in held.items()])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit(d, model_type="mamba"), 'model_type "mamba" is not supported; supported are'),
        (
            lambda d: edit(d, architectures=["LlamaForQuestionAnswering"]),
            "the class LlamaForQuestionAnswering is not supported",
        ),
        (lambda d: edit(d, hidden_act="xielu"), 'hidden_act is "xielu", and supported are'),
        (lambda d: edit(d, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), 'rope_type is "longrope"'),
        (lambda d: edit(d, hidden_size="gone"), "has no hidden_size"),
        (lambda d: edit(d, hidden_size="32"), 'makes a network that cannot be: the config: model.model_dim is "32"'),
        (lambda d: edit(d, num_attention_heads=0), "makes a network that cannot be: model.num_heads is 0"),
        (lambda d: edit(d, num_key_value_heads=3), "is not divisible by model.num_kv_heads 3"),
        (lambda d: edit(d, rope_scaling="linear"), "has a value that cannot be"),
        (lambda d: edit(d, quantization_config={"quant_method": "fp8"}), "quantized weights are not read"),
        (lambda d: rewrite(d, lambda t: t.pop("model.norm.weight")), "has no tensor model.norm.weight"),
        (
            lambda d: rewrite(d, lambda t: t.update(extra=np.zeros(3, np.float32))),
            "has a tensor extra, for which LlamaForCausalLM",
        ),
        (
            lambda d: rewrite(d, lambda t: t.update({"model.norm.weight": np.zeros(5, np.float32)})),
            "model.norm.weight has shape [5], and the config.json beside it makes [32]",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "safetensors"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:5000]),
            "model.safetensors",
        ),
    ],
    ids=[
        "type",
        "class",
        "activation",
        "rope",
        "key",
        "text",
        "zero",
        "heads",
        "scaling",
        "quantized",
        "missing",
        "extra",
        "shape",
        "weights",
        "truncated",
    ],
)
def test_what_cannot_be_read_is_one_sentence_and_leaves_nothing(llama, tmp_path, damage, message):
    damage(llama)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        import_directory(llama, str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama"]


def test_a_tokenizer_with_more_ids_than_rows_is_refused(run, llama, tmp_path):
    export(RunDirectory.open(run), tmp_path / "out")
    shutil.copy(tmp_path / "out" / "tokenizer.json", llama / "tokenizer.json")
    rewrite(llama, lambda t: t.update({n: v[:4] for n, v in t.items() if v.shape[0] == 99}))
    edit(llama, vocab_size=4)
    with pytest.raises(UserError, match="4"):
        import_directory(llama, str(tmp_path / "run"))


def test_what_older_files_hold_twice_or_beside(llama):
    rewrite(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}))
    open_published(llama)
    rewrite(llama, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    edit(llama, tie_word_embeddings=True)
    open_published(llama)
    rewrite(llama, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_published(llama)
