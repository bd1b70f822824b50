"""What a run will be, without running it: parameters, FLOPs, memory, learning rate, hours. Allocates nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from maxpretrain import hardware, optim
from maxpretrain.config import Run, validate
from maxpretrain.configio import checked
from maxpretrain.errors import UserError
from maxpretrain.mesh import Layout, make_layout
from maxpretrain.monitor.flops import training_flops
from maxpretrain.nn.base import is_spec
from maxpretrain.plan import memory
from maxpretrain.plan.render import render
from maxpretrain.plan.target import Target, find_target

__all__ = ["DEFAULT_MFU", "Module", "Plan", "Target", "plan", "render"]

# What a well-tuned run reaches on an accelerator, causal attention counted once; the best published are near 0.6.
DEFAULT_MFU = 0.4

_COLUMNS = 60  # points of the learning-rate curve


@dataclasses.dataclass(frozen=True)
class Module:
    """Part of a model.

    Attributes:
        path: in the tree of parameters, dotted.
        layers: how many of it are stacked; 1 outside the stack.
        parameters: in all layers.
        decayed: those of them that weight decay applies to.
    """

    path: str
    layers: int
    parameters: int
    decayed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run foreseen. Counts are exact; activations, logits and hours are estimates.

    Attributes:
        vocab_source: where the vocabulary size is from.
        modules: parameters by module.
        decayed: parameters that weight decay applies to.
        no_decay: dotted paths of the parameters it does not apply to.
        tokens_per_step, tokens: of one step and of the whole run.
        flops_per_token, flops_per_step, flops: causal attention counted once; `_full`: as a full square.
        device, devices, mesh: planned for.
        execution: dtype, remat, scan, attention, loss_chunk that will be used.
        memory: part -> bytes, on each device.
        memory_limit: bytes of a device; None where unknown.
        fits: None where the limit is unknown.
        advice: what would fit; empty where it fits.
        peak_flops, peak_source: of one device.
        mfu, mfu_source: causal, given or assumed.
        learning_rate: (step, rate) along the run; steps as in the metrics, from 1.
        notes: choices that were left to the rule table.
    """

    name: str
    architecture: str
    vocab_size: int
    vocab_source: str
    parameters: int
    decayed: int
    weight_decay: float
    modules: tuple[Module, ...]
    no_decay: tuple[str, ...]
    steps: int
    batch_size: int
    length: int
    microbatches: int
    tokens_per_step: int
    tokens: int
    flops_per_token: float
    flops_per_token_full: float
    flops_per_step: float
    flops_per_step_full: float
    flops: float
    flops_full: float
    device: str
    devices: int
    mesh: str
    execution: dict[str, Any]
    memory: dict[str, int]
    memory_total: int
    memory_limit: int | None
    fits: bool | None
    advice: str
    peak_flops: float
    peak_source: str
    mfu: float
    mfu_source: str
    step_seconds: float
    tokens_per_second: float
    hours: float
    schedule: str
    peak_lr: float
    learning_rate: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def _vocabulary(run: Run) -> tuple[int, str]:
    """The vocabulary's size and where it is from, without reading any data."""
    config = run.tokenizer
    if run.model.vocab_size is not None:
        return run.model.vocab_size, "model.vocab_size"
    if config.path:
        from maxpretrain.data.tokenizer import load_tokenizer

        return load_tokenizer(config.path, config.kind).vocab_size, config.path
    if config.kind == "bytes":
        from maxpretrain.data.prepare import with_symbols

        return 256 + len(config.user_symbols) + len(with_symbols(run).control_symbols), "bytes"
    if config.kind == "characters":
        return config.vocab_size, "tokenizer.vocab_size; the text's characters will be counted when data is prepared"
    return config.vocab_size, "tokenizer.vocab_size"


def _path(path: tuple[Any, ...]) -> list[str]:
    return [str(entry.key) for entry in path]


def _modules(abstract: Any) -> tuple[tuple[Module, ...], tuple[str, ...]]:
    """Parameters by module (a child of the network, or of a stacked block), and the paths without weight decay."""
    leaves = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=is_spec)[0]
    decays = jax.tree.leaves(optim.decay_mask(abstract))
    modules: dict[str, Module] = {}
    no_decay = []
    for (keys, spec), decayed in zip(leaves, decays, strict=True):
        if spec.role == "buffer":  # not learned
            continue
        path = _path(keys)
        # decoder.stack.block.attention.query.kernel counts as decoder.stack.block.attention; embed.table as embed.
        name = ".".join(path[:4] if spec.stacked else path[:2] if len(path) > 2 else path[:1])
        layers = spec.shape[0] if spec.stacked else 1
        module = modules.get(name, Module(name, layers, 0, 0))
        modules[name] = Module(name, layers, module.parameters + spec.size, module.decayed + spec.size * decayed)
        if not decayed:
            no_decay.append(".".join(path))
    return tuple(modules.values()), tuple(no_decay)


def _curve(run: Run) -> tuple[tuple[int, float], ...]:
    rate = optim.schedule(
        run.optimizer.schedule, peak_lr=run.optimizer.peak_lr, steps=run.steps, tokens_per_step=run.tokens_per_step
    )
    updates = np.unique(np.linspace(0, run.steps - 1, _COLUMNS).round().astype(np.int64))
    return tuple((int(n) + 1, float(r)) for n, r in zip(updates, rate(updates), strict=True))


def _layouts(run: Run, target: Target) -> list[Layout]:
    """The run's own, then those that cut parameters over more of the same devices."""
    own = make_layout(run.mesh, target.devices)
    sizes = own.sizes
    spare = sizes["data"]
    more = [k for k in range(2, spare + 1) if spare % k == 0]
    changed = [dataclasses.replace(run.mesh, data=spare // k, fsdp=sizes["fsdp"] * k) for k in more]
    return [own] + [make_layout(mesh, target.devices) for mesh in changed]


def plan(run: Run, target: str | None = None, mfu: float | None = None, devices: int | None = None) -> Plan:
    """What `run` will be on the devices here, or on those of `target`.

    Args:
        run: needs no data: an unknown vocabulary has the size that the tokenizer's config names.
        target: accelerator, with or without a number, such as h200, h200-8, v5p-128; None: the devices here.
        mfu: share of peak FLOP/s to expect, causal attention counted once, in (0, 1]; None: 0.4.
        devices: how many; None: those of the target, or those here.

    Returns:
        The plan; `fits` False where the estimate is above a device's memory.

    Raises:
        UserError: the config is wrong, or names a mesh that the devices do not make, as `train` would say.
    """
    run = checked(run)
    validate(run)
    if run.init_from:
        from maxpretrain.train import start

        run = start.resolve(run)[0]
        validate(run, resolved=True)
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu is {mfu}; it is a share of peak FLOP/s, above 0 and at most 1")
    vocab_size, vocab_source = _vocabulary(run)
    run = run.replace(model=dataclasses.replace(run.model, vocab_size=vocab_size))
    where = find_target(target, devices)
    layouts = _layouts(run, where)
    layout = layouts[0]

    parts = layout.extent("batch")
    execution, notes = hardware.resolve(run, where.devices[0], devices=len(where.devices), batch_parts=parts)
    model = run.objective.build(run.model, execution)
    layout.check(model.abstract, run.batch.size, run.batch.microbatches)
    modules, no_decay = _modules(model.abstract)
    optimizer = optim.build_optimizer(
        run.optimizer, steps=run.steps, tokens_per_step=run.tokens_per_step, decay_mask=optim.decay_mask(model.abstract)
    )
    need = memory.estimate(run, model, optimizer, layout)
    total = sum(need.values())
    fits = None if where.memory is None else total <= where.memory
    advice = "" if fits is not False else memory.what_would_fit(run, model, optimizer, layouts, where.memory)

    return Plan(
        **_described(run, where, mfu),
        vocab_source=vocab_source,
        parameters=sum(m.parameters for m in modules),
        decayed=sum(m.decayed for m in modules),
        modules=modules,
        no_decay=no_decay,
        mesh=layout.describe(),
        execution=dataclasses.asdict(execution),
        memory=need,
        memory_total=total,
        fits=fits,
        advice=advice,
        notes=tuple(notes),
    )


def _described(run: Run, where: Target, mfu: float | None) -> dict[str, Any]:
    """What of a plan follows from the config, the devices' peak and the MFU alone: tokens, work, time, learning rate."""
    causal, full = (training_flops(run.objective, run.model, run.batch.length, causal=c) for c in (True, False))
    step_tokens, tokens = run.tokens_per_step, run.tokens_per_step * run.steps
    count, reached = len(where.devices), mfu or DEFAULT_MFU
    per_second = count * where.peak_flops * reached / causal
    return {
        "name": run.name,
        "architecture": run.model.architecture,
        "vocab_size": run.model.vocab_size,
        "weight_decay": run.optimizer.weight_decay,
        "steps": run.steps,
        "batch_size": run.batch.size,
        "length": run.batch.length,
        "microbatches": run.batch.microbatches,
        "tokens_per_step": step_tokens,
        "tokens": tokens,
        "flops_per_token": causal,
        "flops_per_token_full": full,
        "flops_per_step": causal * step_tokens,
        "flops_per_step_full": full * step_tokens,
        "flops": causal * tokens,
        "flops_full": full * tokens,
        "device": where.kind,
        "devices": count,
        "memory_limit": where.memory,
        "peak_flops": where.peak_flops,
        "peak_source": where.peak_source,
        "mfu": reached,
        "mfu_source": "assumed" if mfu is None else "given",
        "step_seconds": step_tokens / per_second,
        "tokens_per_second": per_second,
        "hours": tokens / per_second / 3600,
        "schedule": run.optimizer.schedule.shape,
        "peak_lr": run.optimizer.peak_lr,
        "learning_rate": _curve(run),
    }
