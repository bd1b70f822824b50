"""Learning-rate schedules: a linear warmup, then one of nine shapes, each a factor of the peak.

Time. Update number n counts from 0, and its learning rate is that of t = n + 1: the time at which the update is done. So
t is the `step` that the metrics of that update carry, the first update (t = 1) is never wasted on a rate of zero, the
update t = W has exactly the peak, the last one (t = T) exactly the final value, and the published formulas hold with
that t (Noam's step number, too, begins at 1).

Unit. All arithmetic is in whole steps: lengths given in tokens are rounded to the nearest number of steps (at least
one, where above zero). No product steps × tokens, which overflows int32 from 2·10⁹ tokens on, is ever formed, and n
stays an exact integer until it is divided once.

With W the warmup, T the run's steps, f = `final` and r = (T − t) / (T − W) what remains after the warmup, the factor is

    warmup         t ≤ W: from + (1 − from)·t/W
    constant       1
    linear         f + (1 − f)·r
    cosine         f + (1 − f)·½(1 + cos π(1 − r))
    polynomial     f + (1 − f)·r^power
    inverse_sqrt   √(W/t): with the warmup, Noam's min(t^−½, t·W^−1.5) scaled to its own peak; W = 0 counts as 1
    exponential    rate^(1 − r)
    step           rate^(number of boundaries b < t): the update after boundary b is the first with the lower rate
    wsd            1 until T − decay, then linear: f + (1 − f)·q, or sqrt: f + (1 − f)·(1 − √(1 − q)), q = (T − t)/decay
    cosine_cycles  cosine, over again after each `cycle` steps; a cycle's last step has exactly f

`final` has no part in constant, inverse_sqrt, exponential and step. After T the factor stays what it was at T, but for
inverse_sqrt, step and cosine_cycles, which go on.

References:
    Vaswani et al., 2017, Attention Is All You Need, arXiv:1706.03762, §5.3 (inverse_sqrt).
    Loshchilov and Hutter, 2017, SGDR, arXiv:1608.03983, §3 (cosine, cycles; we scale by the factor, not the cycle).
    Hu et al., 2024, MiniCPM, arXiv:2404.06395, §4 (warmup-stable-decay).
    Hägele et al., 2024, Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, arXiv:2405.18392,
        §3 (1 − √ decay).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxpretrain.config import ScheduleConfig
from maxpretrain.errors import UserError

Schedule = Callable[[Any], Any]
_Height = Callable[[Any, Any], Any]  # (numpy or jax.numpy, t int) -> factor after the warmup


def _in_steps(count: int, unit: str, tokens_per_step: int) -> int:
    """`count` of `unit` as a whole number of steps, nearest, and at least 1 where above 0."""
    if unit == "steps" or count <= 0:
        return count
    return max(1, (2 * count + tokens_per_step) // (2 * tokens_per_step))


def _divide(xp: Any, numerator: Any, denominator: int) -> Any:
    """numerator / denominator in float; integers up to 2^24 are exact before the division."""
    return _float(xp, numerator) / float(denominator)


def _float(xp: Any, value: Any) -> Any:
    return np.asarray(value, np.float64) if xp is np else jnp.asarray(value).astype(jnp.float32)


def _remaining(xp: Any, t: Any, begin: int, end: int) -> Any:
    """1 at t = begin, 0 at t = end and after; float in [0, 1]."""
    return _divide(xp, xp.clip(end - t, 0, end - begin), max(end - begin, 1))


def _between(height: Any, final: float) -> Any:
    """`height` 1 gives exactly 1, and 0 exactly `final`."""
    return final * (1.0 - height) + height


def _cosine(xp: Any, progress: Any) -> Any:
    return 0.5 * (1.0 + xp.cos(math.pi * progress))


def _constant(xp: Any, t: Any) -> Any:
    return xp.ones_like(_float(xp, t))


def _decaying(config: ScheduleConfig, warmup: int, steps: int) -> _Height:
    """linear, cosine, polynomial and exponential: functions of what remains of the run."""
    final, power, log_rate = config.final, config.power, math.log(config.rate) if config.rate > 0 else 0.0

    def height(xp: Any, t: Any) -> Any:
        remaining = _remaining(xp, t, warmup, steps)
        if config.shape == "exponential":
            return xp.exp(log_rate * (1.0 - remaining))
        if config.shape == "cosine":
            remaining = _cosine(xp, 1.0 - remaining)
        elif config.shape == "polynomial":
            remaining = remaining**power
        return _between(remaining, final)

    return height


def _inverse_sqrt(warmup: int) -> _Height:
    return lambda xp, t: xp.sqrt(max(warmup, 1) / _float(xp, t))


def _stepwise(config: ScheduleConfig, boundaries: list[int]) -> _Height:
    def height(xp: Any, t: Any) -> Any:
        factor = _constant(xp, t)
        for number, boundary in enumerate(boundaries, start=1):  # a literal each: no power in float32
            factor = xp.where(t > boundary, _constant(xp, t) * config.rate**number, factor)
        return factor

    return height


def _warmup_stable_decay(config: ScheduleConfig, warmup: int, steps: int, decay: int) -> _Height:
    def height(xp: Any, t: Any) -> Any:
        remaining = _remaining(xp, t, steps - decay, steps) if decay else _constant(xp, t)
        if config.decay_shape == "sqrt":
            remaining = remaining / (1.0 + xp.sqrt(1.0 - remaining))  # 1 − √(1 − r), without the cancellation
        return _between(remaining, config.final)

    return height


def _cosine_cycles(config: ScheduleConfig, warmup: int, cycle: int) -> _Height:
    def height(xp: Any, t: Any) -> Any:
        # Phases are 1 … cycle, never 0: the last step of a cycle, and so of the run, is at the bottom and not back at the top.
        # Before the warmup's end the value is not used, but the remainder of a negative number must not surprise.
        phase = (xp.maximum(t - warmup, 1) - 1) % cycle + 1
        return _between(_cosine(xp, _divide(xp, phase, cycle)), config.final)

    return height


def _shape(config: ScheduleConfig, warmup: int, steps: int, tokens_per_step: int) -> _Height:
    """The factor after the warmup."""
    shape, unit = config.shape, config.unit
    if shape == "constant":
        return _constant
    if shape in ("linear", "cosine", "polynomial", "exponential"):
        if shape == "polynomial" and config.power <= 0:
            raise UserError(f"optimizer.schedule.power is {config.power}; it must be above 0")
        if shape == "exponential" and config.rate <= 0:
            raise UserError(f"optimizer.schedule.rate is {config.rate}; it must be above 0")
        return _decaying(config, warmup, steps)
    if shape == "inverse_sqrt":
        return _inverse_sqrt(warmup)
    if shape == "step":
        early = [b for b in config.boundaries if b < config.warmup]
        if early:
            raise UserError(
                f"optimizer.schedule.boundaries has {early[0]}, inside the warmup of {config.warmup} {unit}; "
                f"begin them at {config.warmup} or shorten the warmup"
            )
        return _stepwise(config, [_in_steps(b, unit, tokens_per_step) for b in config.boundaries])
    if shape == "wsd":
        decay = steps // 5 if config.decay is None else _in_steps(config.decay, unit, tokens_per_step)
        return _warmup_stable_decay(config, warmup, steps, min(decay, steps - warmup))
    if shape == "cosine_cycles":
        # Four cycles share what the warmup leaves, so that the run ends at the end of one.
        cycle = -(-(steps - warmup) // 4) if config.cycle is None else _in_steps(config.cycle, unit, tokens_per_step)
        return _cosine_cycles(config, warmup, max(cycle, 1))
    raise UserError(f'optimizer.schedule.shape is "{shape}"; there is no such schedule')


def schedule(config: ScheduleConfig, *, peak_lr: float, steps: int, tokens_per_step: int) -> Schedule:
    """The learning rate of each update, as defined at the top of this file.

    Args:
        config: the schedule; its lengths are in `config.unit`.
        peak_lr: the learning rate where the factor is 1.
        steps: updates in the run, T.
        tokens_per_step: tokens of one update; used where the unit is tokens.

    Returns:
        A function of the update number n, from 0. A Python int or a numpy integer array gives numpy float32 of its shape
        (evaluated in float64); a jax integer array, or a tracer under jit, gives jax float32 of its shape.

    Raises:
        UserError: a warmup longer than the run, a boundary inside the warmup, or a power or rate out of range.
    """
    warmup = _in_steps(config.warmup, config.unit, tokens_per_step)
    if not 0 <= warmup <= steps:
        raise UserError(
            f"optimizer.schedule.warmup of {config.warmup} {config.unit} is {warmup} of the run's {steps} steps; "
            "shorten the warmup or lengthen the run"
        )
    after = _shape(config, warmup, steps, tokens_per_step)

    def learning_rate(update: Any) -> Any:
        xp = np if isinstance(update, (int, np.ndarray, np.integer)) else jnp
        t = xp.asarray(update) + 1
        factor = after(xp, t)
        if warmup:
            ramp = _between(_divide(xp, xp.minimum(t, warmup), warmup), config.warmup_from)
            factor = xp.where(t <= warmup, ramp, factor)
        return np.asarray(peak_lr * factor, np.float32)[()] if xp is np else peak_lr * factor

    return learning_rate
