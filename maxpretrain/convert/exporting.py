"""A run's network as a Hugging Face directory, checked by reading it back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain import __version__
from maxpretrain.config import ModelConfig
from maxpretrain.convert import tensors
from maxpretrain.convert.mapping import Mapping
from maxpretrain.convert.published import open_published
from maxpretrain.errors import StorageError, UserError
from maxpretrain.fingerprint import named_leaves, nested
from maxpretrain.models import build, families
from maxpretrain.models.families.options import Options
from maxpretrain.rundir import RunDirectory

# What says how a network is trained, not what it computes: config.json has no place for all of it.
_TRAINING = ("heads", "num_labels", "dropout", "init", "init_std", "depth_scaled_init", "mup_base", "mup_base_head")
_PRETRAINING = ("replaced", "span_boundary")  # heads that a class may lack: they serve training alone
MARK = "maxpretrain_export.json"
LENGTH = 64  # tokens of the texts on which the result is compared


@dataclasses.dataclass(frozen=True)
class Target:
    """The published class that a network can be.

    Attributes:
        family: its module.
        class_name: as `architectures` in config.json.
        options: keys of config.json.
        model: the network's shape, with the heads that the class has.
    """

    family: ModuleType
    class_name: str
    options: dict[str, Any]
    model: ModelConfig


def find_target(model: ModelConfig, model_type: str | None = None) -> Target:
    """The class whose config.json says everything that this shape says; else one that lacks only heads of pretraining.

    Args:
        model_type: of the family to prefer, where several say the same.

    Raises:
        UserError: none does; names the nearest class and the fields in which it differs.
    """
    # Noise on the router's logits is of training: the published network is the one that evaluation measures.
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, noisy=False))
    try:
        return _find_target(model, model_type)
    except UserError:
        kept = tuple(head for head in model.heads if head not in _PRETRAINING)
        if kept == model.heads:
            raise
        try:
            return _find_target(dataclasses.replace(model, heads=kept), model_type)
        except UserError:
            pass  # the first says more
        raise


def _find_target(model: ModelConfig, model_type: str | None) -> Target:
    tried: list[tuple[int, str, list[str]]] = []
    # Where several say the same, the one that most programs read.
    common = [families.FAMILIES[name] for name in ("llama", "gpt2", "bert", "t5")]
    known = families.by_type(model_type) if model_type else None
    common = common if known is None else [known, *(f for f in common if f is not known)]
    for family in [*common, *(f for f in families.FAMILIES.values() if f not in common)]:
        if not hasattr(family, "MODEL_TYPE"):
            continue
        class_name = next((name for name, heads in family.CLASSES.items() if heads == model.heads), None)
        if class_name is None:
            continue
        try:
            options = json.loads(json.dumps(family.to_options(model)))
            back = dataclasses.replace(
                family.from_options(Options(options)), heads=model.heads, num_labels=model.num_labels
            )
        except (UserError, KeyError, ValueError, TypeError, AssertionError):
            continue
        different = _differences(model, back)
        if not different:
            return Target(family, class_name, options, model)
        tried.append((len(different), class_name, different))
    if not tried:
        raise UserError(f"no published class has a {model.architecture} with the heads {', '.join(model.heads)}")
    _, name, different = min(tried, key=lambda one: one[0])
    raise UserError(
        f"no published class has this shape; the nearest is {name}, which differs in {', '.join(different[:4])}: train with what it "
        "has to export to it"
    )


def _differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields by which two networks compute something else."""
    a, b = _resolved(model), _resolved(other)
    differing = [name for name in a if a[name] != b.get(name)]
    return [f"model.{name} ({_short(b.get(name))}, not {_short(a[name])})" for name in differing]


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 40 else f"{str(value)[:36]} …"


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """What a shape comes to: defaults in place of None, and nothing of what plays no part in it."""
    fields = {name: value for name, value in dataclasses.asdict(model).items() if name not in _TRAINING}
    fields |= {"num_kv_heads": model.kv_heads, "head_dim": model.head_width, "mlp_dim": model.mlp_width}
    fields |= {"embed_dim": model.embed_width, "num_decoder_layers": model.decoder_layers}
    for part in ("qkv_bias", "out_bias", "mlp_bias", "norm_bias"):
        fields[part] = model.bias if fields[part] is None else fields[part]
    scaled = model.position == "sinusoidal" if model.embed_scale is None else model.embed_scale
    fields["embed_scale"] = scaled
    fields["logit_scale"] = model.logit_scale * model.mup_ratio
    if model.mup_base_head is not None and model.attention_scale is None:
        fields["attention_scale"] = math.sqrt(model.mup_base_head) / model.head_width
    if model.norm != "layernorm":
        fields.pop("norm_bias")
    # `bias` itself is left in what the parts do not cover: projections around the embedding, and heads.
    if model.embed_width == model.model_dim and not model.lm_transform and set(model.heads) <= {"lm"}:
        fields.pop("bias")
    if model.architecture != "encoder-decoder":
        fields.pop("num_decoder_layers")
    unused = {"rope": model.position != "rope", "relative": model.position not in ("t5", "disentangled")}
    unused |= {"latent": not model.latent.kv_rank, "moe": not model.moe.num_experts}
    if model.moe.num_experts:
        # How many places an expert has is a matter of training: the reference drops no token.
        fields["moe"] |= {"expert_dim": model.expert_width, "capacity": None}
        fields["moe"]["dense_layers"] = tuple(sorted(model.moe.dense_layers))
        unused["mlp_dim"] = not model.moe.dense_layers
    unused["layer_pattern"] = True
    unused["num_kv_heads"] = bool(model.latent.kv_rank)
    unused["position_offset"] = model.position != "learned"
    unused |= dict.fromkeys(("tie_embeddings", "lm_transform", "lm_activation", "lm_bias"), "lm" not in model.heads)
    unused["pooler_activation"] = "pooler" not in model.heads
    for name, no_part in unused.items():
        if no_part:
            fields.pop(name)
    fields["local_layers"] = [model.is_local(i) for i in range(model.num_layers)]
    return fields


def export(run: RunDirectory, directory: Path, *, step: int | None = None, dtype: str = "float32") -> dict[str, Any]:
    """Writes the files, loads them again, and compares.

    Args:
        run: whose network.
        directory: to make; one that an earlier export made is replaced.
        step: of the checkpoint; None: the last one.
        dtype: of the file: "float32", "bfloat16" or "float16".

    Returns:
        "directory", "class", "step", "parameters", "dtype", "files", "notes"; and under "ours", and "transformers" where that is installed,
        what `compare` found. A network that was trained beside it, such as a generator, is a directory within, in "files" by its
        path; where no class can be it, a note says so.

    Raises:
        UserError: the directory holds something else, or no published class has this shape; nothing was written.
        StorageError: the disk is full, or what was read back differs from what was written.
    """
    directory = directory.absolute()
    _check_free(directory)
    step = run.step(step)
    target = find_target(run.config.model, run.meta(step).get("model_type"))
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        trained = run.config.objective.build(run.config.model)
        networks = trained.networks(run.params(step))
        _, params = networks.pop("")
        result = _write(partial, run, target, params, step, dtype)
        if left := [head for head in run.config.model.heads if head not in target.model.heads]:
            result["notes"].append(f"{target.class_name} has no head {' and '.join(left)}, which was left out")
        for name, (model, params) in networks.items():
            try:
                beside = find_target(model, target.family.MODEL_TYPE)
            except UserError as error:
                result["notes"].append(f"the {name} was left out: {error}")
                continue
            (partial / name).mkdir()
            made = _write(partial / name, run, beside, params, step, dtype)
            result["files"] += [f"{name}/{file}" for file in made["files"]]
            result["notes"] += [f"{name}: {note}" for note in made["notes"]]
        _mark(partial)
        _replace(partial, directory)
    except OSError as error:
        raise StorageError(
            f"{directory} could not be written: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"directory": str(directory), "class": target.class_name, "step": step} | result


def _write(directory: Path, run: RunDirectory, target: Target, params: Any, step: int, dtype: str) -> dict[str, Any]:
    """Writes one network, reads it back and compares: "parameters", "dtype", "files", "notes", and what was found.

    Args:
        params: of a plain network of the target's shape, or of one with more heads.

    Raises:
        StorageError: what was read back differs.
    """
    model = build(target.model)
    leaves = named_leaves(params)
    params = nested({name: leaves[name] for name in named_leaves(model.abstract)})
    mapping = Mapping(model, target.family.names(target.model))
    extra = getattr(target.family, "extra", lambda model: {})(target.model)
    files = tensors.write(directory, _sources(mapping, params, dtype, extra))
    notes = _write_configs(directory, run, target, step, dtype)
    found = {"ours": _compare_ours(directory, target.model, params)}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        from maxpretrain.convert.reference import compare_reference

        try:
            found["transformers"] = compare_reference(directory, target.class_name, model, params)
        except StorageError:
            raise
        except Exception as error:  # what the library makes of its own class is no fault of the files
            first = (str(error).splitlines() or [""])[0]
            notes.append(f"transformers could not run {target.class_name}: {type(error).__name__}: {first[:200]}")
    for reader, result in found.items():
        _check_same(reader, result, dtype)
    sizes = [math.prod(shape) for _, shape, _, _ in _sources(mapping, params, dtype, extra)]
    files = sorted(path.name for path in files)
    return {"parameters": sum(sizes), "dtype": dtype, "files": files, "notes": notes} | found


def _check_same(reader: str, found: dict[str, float], dtype: str) -> None:
    """Refuses a result that is no rounding.

    Raises:
        StorageError: a score is not finite, or differs by more than the file's dtype explains.
    """
    limit = 1e-3 if dtype == "float32" else 0.5
    if not all(math.isfinite(value) for value in found.values()) or found["max_difference"] > limit * found["scale"]:
        raise StorageError(
            f"what {reader} reads back differs by {found['max_difference']:.3g} in a logit, where the largest is {found['scale']:.3g}; "
            f"nothing was written (dtype {dtype}: --dtype float32 loses nothing)"
        )


def _sizes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if not path.is_dir())
    return {path.relative_to(directory).as_posix(): path.lstat().st_size for path in files}


def _mark(directory: Path) -> None:
    """Notes what an export consists of, so that a later one knows what it may replace."""
    (directory / MARK).write_text(json.dumps({"files": _sizes(directory)}, indent=1) + "\n", encoding="utf-8")


def _check_free(directory: Path) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        made = json.loads((directory / MARK).read_bytes())["files"]
        there = _sizes(directory)
        there.pop(MARK)
        untouched = made == there
    except (OSError, ValueError, TypeError, KeyError):
        untouched = False
    if not untouched:
        raise UserError(
            f"{directory} holds something that no export of ours made, or that changed since; name a new directory, or empty this one"
        )


def _replace(partial: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _sources(mapping: Mapping, params: Any, dtype: str, extra: dict[str, np.ndarray]) -> Iterator[Any]:
    kind = jnp.dtype(dtype)
    for name, shape, make in mapping.store(params):
        yield name, shape, kind, lambda make=make: make().astype(kind)
    for name, value in extra.items():
        yield name, value.shape, kind, lambda value=value: value.astype(kind)


def _write_configs(directory: Path, run: RunDirectory, target: Target, step: int, dtype: str) -> list[str]:
    """config.json, generation_config.json and the tokenizer's files; what is worth saying of these."""
    from maxpretrain.convert.tokenizers import export_tokenizer, generation_config

    model, tokenizer = target.model, run.tokenizer
    config = {"architectures": [target.class_name], "model_type": target.family.MODEL_TYPE}
    # Left out, they would be those of the reference's own tokenizer, which may lie outside this vocabulary.
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config |= run.meta(step).get("special_ids", {}) | target.options
    config |= {"dtype": dtype, "torch_dtype": dtype, "use_cache": True}
    if {"sequence", "token"} & set(model.heads):
        labels = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
        config |= {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    if model.decoder_start_id is not None:
        config["decoder_start_token_id"] = model.decoder_start_id
    if tokenizer is not None:
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
        config |= {name: value for name, value in ids.items() if value is not None}
    config["maxpretrain"] = {"version": __version__, "run": run.config.name, "step": step}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer is None:
        return ["there is no tokenizer"]
    notes = export_tokenizer(
        tokenizer,
        directory,
        max_length=model.max_length,
        architecture=model.architecture,
        model_type=target.family.MODEL_TYPE,
    )
    if model.architecture != "encoder":
        text = json.dumps(generation_config(tokenizer, model), indent=2) + "\n"
        (directory / "generation_config.json").write_text(text, encoding="utf-8")
    return notes


def _compare_ours(directory: Path, model: ModelConfig, params: Any) -> dict[str, float]:
    """What our own import makes of the files, against what went into them."""
    back = open_published(directory)
    if differing := _differences(model, back.config.model):
        raise StorageError(f"config.json does not read back as the same network: {', '.join(differing)}")
    inputs = sample_inputs(model)
    ask = lambda config, params: jax.jit(lambda p: main_output(build(config), p, inputs))(params)  # noqa: E731
    return compare(np.asarray(ask(model, params)), np.asarray(ask(back.config.model, back.params())))


def sample_inputs(model: ModelConfig) -> dict[str, jax.Array]:
    """Random tokens [2, T], the same each time; not the first ids, of which one may be padding to the reference."""
    assert model.vocab_size is not None
    first = min(8, model.vocab_size // 2)
    rng = np.random.default_rng(0)
    shape = (2, min(LENGTH, model.max_length))
    draw = lambda: jnp.asarray(rng.integers(first, model.vocab_size, shape), jnp.int32)  # noqa: E731
    return {"tokens": draw()} | ({"decoder_tokens": draw()} if model.architecture == "encoder-decoder" else {})


def main_output(model: Any, params: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    """The logits where there are some; else what the first head says."""
    output = model.apply(params, **inputs)
    if "lm" in model.config.heads:
        return model.logits(params, output.hidden)
    said = model.head_outputs(params, output.hidden)
    return next((value for name, value in said.items() if name.endswith("logits")), output.hidden)


def compare(expected: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """Scores against scores of shape [..., V].

    Returns:
        "max_difference" of the scores, "scale", the largest of them, "kl" in nats a position, on average, and "agreement", the share of positions with the
        same highest score.
    """
    a, b = (x.astype(np.float64) for x in (expected, got))
    log_p, log_q = (x - _logsumexp(x) for x in (a, b))
    kl = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    return {
        "max_difference": float(np.abs(a - b).max()),
        "scale": float(np.abs(a).max()),
        "kl": float(kl.mean()),
        "agreement": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))
