"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maxpretrain.monitor.units import count, duration, percent, significant
from maxpretrain.plan.curve import draw

if TYPE_CHECKING:  # pragma: no cover
    from maxpretrain.plan import Plan


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns aligned: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def _endings(paths: tuple[str, ...]) -> str:
    """`positions.table, 9 × bias, 5 × scale`: paths by their last name; the whole list is in the JSON."""
    endings: dict[str, list[str]] = {}
    for path in paths:
        endings.setdefault(path.rpartition(".")[2], []).append(path)
    said = (group[0] if len(group) == 1 else f"{len(group)} × {last}" for last, group in endings.items())
    return ", ".join(sorted(said, key=lambda text: text[0].isdigit())) or "nothing"


def _parameters(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [("module", "layers", "parameters", "share", "weight decay")]
    for module in plan.modules:
        decay = {0: "none", module.parameters: "all"}.get(module.decayed, f"{module.decayed:,}")
        share = percent(module.parameters / plan.parameters)
        rows.append((module.path, str(module.layers), f"{module.parameters:,}", share, decay))
    rows.append(("total", "", f"{plan.parameters:,}", "100.0 %", f"{plan.decayed:,}"))
    return [
        f"Parameters: {plan.parameters:,}, vocabulary {plan.vocab_size:,} ({plan.vocab_source})",
        *_table(rows),
        f"  weight decay {significant(plan.weight_decay)}, not on {_endings(plan.no_decay)}",
    ]


def _work(plan: Plan) -> list[str]:
    rows = [
        ("", "attention causal", "attention full"),
        ("FLOPs per token", f"{plan.flops_per_token:,.0f}", f"{plan.flops_per_token_full:,.0f}"),
        ("FLOPs per step", *(significant(x) for x in (plan.flops_per_step, plan.flops_per_step_full))),
        ("FLOPs of the run", *(significant(x) for x in (plan.flops, plan.flops_full))),
    ]
    batch = f"{plan.batch_size} × {plan.length} tokens" + (
        f", in {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
    )
    ratio = plan.tokens / plan.parameters
    return [
        f"Tokens: {plan.tokens_per_step:,} per step ({batch}), {plan.tokens:,} in {plan.steps:,} steps, "
        f"{significant(ratio, 3)} per parameter",
        *_table(rows),
    ]


def _memory(plan: Plan) -> list[str]:
    estimated = {
        "activations": f"estimate, remat {plan.execution['remat']}",
        "logits": "estimate, of one chunk of tokens and their gradient",
    }
    lines = [f"Memory per device: {plan.devices} × {plan.device}, {plan.mesh}"]
    widest = max(len(_gib(size)) for size in (*plan.memory.values(), plan.memory_total))
    for part, size in plan.memory.items():
        note = f"  ({estimated[part]})" if part in estimated else ""
        lines.append(f"  {part:<11}  {_gib(size):>{widest}}{note}")
    lines.append(f"  {'total':<11}  {_gib(plan.memory_total):>{widest}}")
    if plan.memory_limit is None:
        return [*lines, "  how much the device has is not known"]
    used = f"{percent(plan.memory_total / plan.memory_limit, 0)} of {_gib(plan.memory_limit)}"
    if plan.fits:
        return [*lines, f"  fits: {used}"]
    return [
        *lines,
        f"  does not fit: {used}; " + (f"{plan.advice} would" if plan.advice else "more devices are needed"),
    ]


def _rate(plan: Plan) -> list[str]:
    steps, rates = zip(*plan.learning_rate, strict=True)
    picture = draw(
        rates, height=8, labels=(significant(max(rates), 3), "0"), below=(f"step {steps[0]}", f"{steps[-1]:,}")
    )
    last = significant(rates[-1], 3)
    head = f"Learning rate: {plan.schedule}, peak {significant(plan.peak_lr, 3)}, last {last}"
    return [head, *("  " + line for line in picture.splitlines())]


def _time(plan: Plan) -> list[str]:
    peak = f"{plan.peak_flops / 1e12:,.4g} TFLOP/s ({plan.peak_source})"
    full = plan.mfu * plan.flops_per_token_full / plan.flops_per_token
    return [
        f"Time: {duration(plan.hours * 3600)}, if MFU is {percent(plan.mfu)} causal, {percent(full)} full ({plan.mfu_source})",
        f"  {plan.devices} × {peak}",
        f"  {significant(plan.step_seconds, 3)} s per step, {count(plan.tokens_per_second)} tokens/s",
    ]


def render(plan: Plan) -> str:
    """The plan for a terminal of 100 columns or more."""
    choices = " · ".join(f"{name} {value}" for name, value in plan.execution.items())
    blocks = [
        [f"Plan of {plan.name}: {plan.architecture}", f"  {choices}", *(f"  chosen: {note}" for note in plan.notes)],
        _parameters(plan),
        _work(plan),
        _memory(plan),
        _time(plan),
        _rate(plan),
    ]
    return "\n\n".join("\n".join(block) for block in blocks)
