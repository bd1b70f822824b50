"""Several objectives in one run: each example is made by one, drawn by weight, and one forward pass serves all."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.base import Fields, Loss, Objective, Reading, Work, require_rising
from maxpretrain.objectives.seq2seq import OPTIONAL, forward

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import ModelConfig, Run
    from maxpretrain.vocabulary import Vocabulary
else:
    np = lazy("numpy")

# What a batch may hold whose loss is the cross entropy of labels under one language model.
PLAIN = {"tokens", "segments", "positions", "places", "decoder_segments", "labels", "weights", *OPTIONAL}
# What a member means that lacks a field which others have; of the optional ones zeros, which come by themselves.
MEANT = {
    "segments": lambda row: np.ones_like(row["tokens"]),
    "positions": lambda row: np.arange(len(row["tokens"]), dtype=np.int32),
    "places": lambda row: np.arange(len(row["labels"]), dtype=np.int32),
}


class Mixed(Objective):
    """A mixture, whatever its members are. Base of such objectives, which have `parts`, `titles` and `shares`.

    Each row is an example of one member. A member that needs less text than the longest gets a part of the window that
    is drawn at random. The loss is the mean over all predictions of the batch: a member counts by how much it predicts.

    Class attributes:
        which: name of the field that says which member made a row.
        path: how errors call a member; None: they do not.
    """

    which: ClassVar[str] = "member"
    path: ClassVar[str | None] = None
    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder", "encoder-decoder")  # members say which
    heads: ClassVar[tuple[str, ...]] = ()

    @property
    def parts(self) -> tuple[Objective, ...]:
        """The members, without their tokens; none of them is a mixture."""
        raise NotImplementedError

    @property
    def given(self) -> tuple[Objective, ...]:
        """What the members are of: they themselves, or mixtures of some."""
        return self.parts

    @property
    def titles(self) -> tuple[str, ...]:
        """What each member's loss is called; those of one name make one mean."""
        raise NotImplementedError

    @property
    def shares(self) -> tuple[float, ...]:
        """How often each member is drawn; they add up to 1."""
        raise NotImplementedError

    @cached_property
    def members(self) -> tuple[Objective, ...]:
        if self.bound is None:
            return self.parts
        return tuple(part.bind(self.bound) for part in self.parts)

    @property
    def overlap(self) -> int:  # type: ignore[override]
        return max(part.overlap for part in self.parts)

    @property
    def perplexity(self) -> bool:  # type: ignore[override]
        return all(part.perplexity for part in self.parts)

    @property
    def whole_text(self) -> bool:  # type: ignore[override]
        return all(part.whole_text for part in self.parts)

    def reading(self, marked: bool) -> Reading:
        """As the members do; where some answer and others go on, a prompt with masks, sentinels or modes is answered."""
        each = [part.reading(marked) for part in self.parts]
        fitting = [reading for reading in each if reading.answers == marked] or each
        return Reading(*map(all, zip(*fitting, strict=True)))

    def validate(self, run: Run) -> None:
        super().validate(run)
        for number, part in enumerate(self.given):
            try:
                part.validate(run)
            except UserError as error:
                if self.path is None:
                    raise
                # The members' fields are called what they are within this one.
                raise UserError(re.sub(r"\bobjective\.", f"{self.path}[{number}].", str(error))) from error
        self._require_alike(run.model.architecture, run.batch.length)

    def _require_alike(self, architecture: str, length: int) -> None:
        """One forward pass and one loss must serve all members."""
        first, *others = self.parts
        for part in self.parts:
            name, fields = type(part).__name__, part.fields(length)
            if unknown := [n for n in fields if n not in PLAIN]:
                raise UserError(
                    f"objective {type(self).__name__} mixes losses that are the cross entropy of labels; {name} also "
                    f"reads {unknown[0]}, so train it alone"
                )
            if architecture == "encoder-decoder" and "decoder_segments" not in fields:
                raise UserError(
                    f"objective {type(self).__name__} cannot mix {name} on an encoder-decoder; use a decoder, or train it alone"
                )
            if type(part).build is not Objective.build or part.heads != ("lm",):
                raise UserError(
                    f"objective {type(self).__name__} mixes losses of one language model; {name} needs more of its "
                    "network, so train it alone"
                )
        for part in others:
            pair = f"{type(first).__name__} and {type(part).__name__}"
            for name, value in _regularization(part).items():
                if (other := _regularization(first)[name]) != value:
                    raise UserError(
                        f"objective {type(self).__name__} mixes {pair} with {name} {other:g} and {value:g}; give all "
                        "members the same"
                    )

    def symbols(self) -> tuple[str, ...]:
        """Those of all members: sentinels at the end, the first one last."""
        found = list(dict.fromkeys(itertools.chain.from_iterable(part.symbols() for part in self.given)))
        number = {name: int(m[1]) for name in found if (m := re.fullmatch(r"<extra_id_(\d+)>", name))}
        return (*(n for n in found if n not in number), *sorted(number, key=lambda n: -number[n]))

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        for part in self.given:
            part.check_vocabulary(vocabulary)

    def raw_length(self, length: int) -> int:
        return max(member.raw_length(length) for member in self.members)

    def fields(self, length: int) -> Fields:
        fields: Fields = {}
        for member in self.members:
            for name, (shape, dtype) in member.fields(length).items():
                other = fields.get(name, (shape, dtype))[0]
                fields[name] = (tuple(map(max, shape, other)), dtype)
        for name in fields.keys() & MEANT:
            fields[name] = fields["labels" if name == "places" else "tokens"]
        return fields | {self.which: ((), "int32")}

    def work(self, model: ModelConfig, length: int) -> list[Work]:
        """That of the longest member in each part: all rows have one shape."""
        works = [member.work(model, length)[0] for member in self.members]
        return [Work(model, *(max(sizes) for sizes in zip(*(w[1:] for w in works), strict=True)))]

    def example(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None, **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """An example of a member that is drawn by the shares, and the field `which`, int32 [], its number.

        Args:
            tokens: integer [n].
            segments: int32 [n], 1, 2, … by document; None: one document.
        """
        number = int(np.searchsorted(np.cumsum(self.shares)[:-1], rng.random(), side="right"))
        needed = self._needed(len(tokens))[number]
        if needed < len(tokens):
            first = int(rng.integers(len(tokens) - needed + 1))
            tokens = tokens[first : first + needed]
            if segments is not None:
                segments = segments[first : first + needed]
                segments = np.where(segments > 0, segments - (segments[0] - 1), 0).astype(np.int32)
        row = self.members[number].example(tokens, rng, segments)
        row |= {name: meant(row) for name, meant in MEANT.items() if name in self._names - row.keys()}
        return row | {self.which: np.array(number, np.int32)}

    @cached_property
    def _names(self) -> set[str]:
        """Fields that some member has, which does not depend on the length."""
        return set().union(*(part.fields(1024) for part in self.parts))

    @cached_property
    def _known(self) -> dict[int, tuple[int, ...]]:
        return {}

    def _needed(self, raw: int) -> tuple[int, ...]:
        """How much of a window each member takes: what it needs for the least length that the window fills."""
        if raw not in self._known:
            length = 1
            while self.raw_length(length) < raw:
                length *= 2
            low = length // 2
            while length - low > 1:
                middle = (low + length) // 2
                low, length = (low, middle) if self.raw_length(middle) >= raw else (middle, length)
            self._known[raw] = tuple(max(min(raw, 2), min(raw, m.raw_length(length))) for m in self.members)
        return self._known[raw]

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        """Metrics: "accuracy", and "loss_<name>", the cross entropy of the rows of each member."""
        import jax.numpy as jnp

        from maxpretrain.objectives.cross_entropy import label_loss

        output = forward(model, params, batch, key)
        groups = {}
        for name in dict.fromkeys(self.titles):
            its = jnp.asarray([number for number, other in enumerate(self.titles) if other == name], jnp.int32)
            groups[name] = (batch[self.which][:, None] == its[None]).any(-1)
        return label_loss(model, params, output, batch, **_regularization(self.parts[0]), groups=groups)


def _regularization(objective: Objective) -> dict[str, float]:
    """What it adds to the cross entropy, where it has such fields."""
    return {name: getattr(objective, name, 0.0) for name in ("label_smoothing", "z_loss")}


def require_shares(shares: tuple[float, ...], count: int, name: str, *, zeros: bool = False) -> None:
    """Raises UserError where these are not `count` positive numbers (or zeros) that add up to 1."""
    if len(shares) != count:
        raise UserError(f"{name} has {len(shares)} numbers for {count} objectives; give one each")
    if not all(map(math.isfinite, shares)):
        raise UserError(f"{name} {shares} must be finite numbers")
    if min(shares) < 0 or (not zeros and min(shares) == 0):
        raise UserError(f"{name} has {min(shares):g}; a weight must be {'at least' if zeros else 'above'} 0")
    if abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"{name} add up to {sum(shares):g}; they must add up to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Mixed):
    """Objectives of one network, drawn by weight for each example; the weights may change along the run.

    Evaluation draws by `weights`, whatever the schedule, and so always the same. The loss of each member is reported by
    itself. A member may be a mixture, such as UL2, whose own shares are then of its weight.
    """

    objectives: tuple[Objective, ...] = ()  # what is mixed: objectives of one network
    weights: tuple[float, ...] = ()  # share of each in the examples; they add up to 1; empty: equal
    # ((step, weights), …), rising: linear in between, constant before the first and after the last.
    schedule: tuple[tuple[int, tuple[float, ...]], ...] = ()  # training's weights by step; empty: `weights` all along
    names: tuple[str, ...] = ()  # of the members in metrics, loss_<name>; empty: those of their classes

    path: ClassVar[str | None] = "objective.objectives"

    @property
    def given(self) -> tuple[Objective, ...]:
        return self.objectives

    @property
    def _unmixed(self) -> tuple[tuple[int, Objective, float], ...]:
        """(place in `objectives`, member, its share of that place's), with the members of mixtures in their places."""
        found: list[tuple[int, Objective, float]] = []
        for place, part in enumerate(self.objectives):
            each = zip(part.parts, part.shares, strict=True) if isinstance(part, Mixed) else ((part, 1.0),)
            found += [(place, member, share) for member, share in each]
        return tuple(found)

    @property
    def parts(self) -> tuple[Objective, ...]:
        return tuple(member for _, member, _ in self._unmixed)

    @property
    def titles(self) -> tuple[str, ...]:
        names = self.names or self._own_names
        return tuple(names[place] for place, *_ in self._unmixed)

    @property
    def _own_names(self) -> tuple[str, ...]:
        classes = [type(part).__name__ for part in self.objectives]
        snake = [re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower() for name in classes]
        several = {name for name, count in Counter(snake).items() if count > 1}
        nth = [snake[: number + 1].count(name) for number, name in enumerate(snake)]
        return tuple(f"{name}_{n}" if name in several else name for name, n in zip(snake, nth, strict=True))

    @property
    def shares(self) -> tuple[float, ...]:
        weights = self.weights or (1.0 / len(self.objectives),) * len(self.objectives)
        return tuple(weights[place] * share for place, _, share in self._unmixed)

    def validate(self, run: Run) -> None:
        count = len(self.objectives)
        if not count:
            raise UserError("objective.objectives is empty; give the objectives to mix, such as (CLM(), PrefixLM())")
        if self.weights:
            require_shares(self.weights, count, "objective.weights")
        for number, (_, shares) in enumerate(self.schedule):
            require_shares(shares, count, f"objective.schedule[{number}]'s weights", zeros=True)
        require_rising([step for step, _ in self.schedule], "objective.schedule")
        if self.names and len(self.names) != count:
            raise UserError(f"objective.names has {len(self.names)} names for {count} objectives; give one each")
        super().validate(run)

    def measured(self) -> Mixture:
        return self.replace(objectives=tuple(part.measured() for part in self.objectives))

    def at(self, step: int) -> Mixture:
        objectives = tuple(part.at(step) for part in self.objectives)
        if not self.schedule and all(a is b for a, b in zip(objectives, self.objectives, strict=True)):
            return self
        weights = scheduled(self.schedule, step) if self.schedule else self.weights
        return self.replace(objectives=objectives, weights=weights, schedule=())


def scheduled(schedule: tuple[tuple[int, tuple[float, ...]], ...], step: int) -> tuple[float, ...]:
    """The weights at a step: linear between the points, constant outside."""
    steps = [at for at, _ in schedule]
    return tuple(
        float(np.interp(step, steps, values)) for values in zip(*(weights for _, weights in schedule), strict=True)
    )
