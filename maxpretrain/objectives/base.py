"""The contract that every objective keeps."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from maxpretrain.errors import UserError

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import ModelConfig, Run
    from maxpretrain.models import Model
    from maxpretrain.nn.stack import Execution
    from maxpretrain.vocabulary import Vocabulary

Fields = dict[str, tuple[tuple[int, ...], str]]
Self = TypeVar("Self", bound="Objective")


class Loss(NamedTuple):
    """A loss before its one division: gradients are of `sum`, and `sum / weight` over the global batch is the mean.

    Attributes:
        sum: float32 [], nats (or the objective's unit) summed over predictions.
        weight: float32 [], number of predictions.
        metrics: name -> (sum, weight) pair of float32 [], reported as sum / weight.
        experts: what the network said of its experts (`Output.aux`), for the balance losses.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]]
    experts: dict[str, jax.Array] = {}  # noqa: RUF012


class Work(NamedTuple):
    """A network that an example goes through, for counting FLOPs.

    Attributes:
        model: its shape; `vocab_size` is a number.
        length: tokens of the example; of an encoder-decoder those of the encoder.
        decoder_length: tokens of the decoder, where there are two stacks.
        predictions: places whose logits are computed.
        extra: elements of matrices outside the model that every token goes through.
    """

    model: ModelConfig
    length: int
    decoder_length: int
    predictions: int
    extra: int = 0


class Reading(NamedTuple):
    """How a prompt is read.

    Attributes:
        both_ways: by a decoder in both directions.
        answers: with eos after it, and a decoder writes an answer rather than to go on from it.
        bos: it begins with bos, where the tokenizer has one.
    """

    both_ways: bool = False
    answers: bool = False
    bos: bool = False


def require_rising(steps: list[int], name: str) -> None:
    """Raises UserError where the steps of a schedule do not rise from 0 or later."""
    if any(b <= a for a, b in itertools.pairwise(steps)) or any(step < 0 for step in steps):
        raise UserError(f"{name} has the steps {steps}; they must be at least 0, and rise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a model is trained to do: how raw tokens become an example (host, numpy), and what the loss is (device, jnp).

    The fields of a subclass are its config. What it has to know of the tokens comes by `bind`.

    Class attributes:
        overlap: raw tokens that one window shares with the next.
        architectures: networks it can train.
        heads: heads of the network that it reads.
        perplexity: exp(loss) is a perplexity.
        whole_text: the loss is of every token of the text, so that it gives bits per byte.
        partner: `example` takes a second window, from another document, as `partner`.
        both_ways, answers, bos: see `Reading`.
    """

    overlap: ClassVar[int] = 0
    architectures: ClassVar[tuple[str, ...]] = ()
    heads: ClassVar[tuple[str, ...]] = ("lm",)
    perplexity: ClassVar[bool] = False
    whole_text: ClassVar[bool] = False
    partner: ClassVar[bool] = False
    both_ways: ClassVar[bool] = False
    answers: ClassVar[bool] = False
    bos: ClassVar[bool] = False
    bound: ClassVar[Any] = None  # a Vocabulary, once it knows its tokens

    def validate(self, run: Run) -> None:
        """Raises UserError where the run cannot train this objective; a subclass calls this, and checks its own fields."""
        name, model = type(self).__name__, run.model
        if model.architecture not in self.architectures:
            kinds = " or ".join(self.architectures)
            article = "an" if kinds.startswith("e") else "a"
            raise UserError(f"objective {name} needs {article} {kinds}; model.architecture is {model.architecture}")
        if missing := [f'"{head}"' for head in self.heads if head not in model.heads]:
            raise UserError(
                f"objective {name} needs the head{'s' if len(missing) > 1 else ''} {' and '.join(missing)}; model.heads are "
                f"{', '.join(model.heads) or 'none'}; add {'them' if len(missing) > 1 else 'it'} to model.heads"
            )

    def symbols(self) -> tuple[str, ...]:
        """Names of the control pieces that a tokenizer trained for it has, in the order of their ids; see `vocabulary`."""
        return ()

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raises UserError where the objective needs a token that the vocabulary has not."""

    def bind(self: Self, vocabulary: Vocabulary) -> Self:
        """The same objective, knowing its tokens.

        Raises:
            UserError: a token that it needs is missing.
        """
        self.check_vocabulary(vocabulary)
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "bound", vocabulary)
        return copy

    def replace(self: Self, **changes: Any) -> Self:
        """A copy with other fields, which knows its tokens if this one does."""
        copy = dataclasses.replace(self, **changes)
        if self.bound is not None:
            object.__setattr__(copy, "bound", self.bound)
        return copy

    @property
    def vocabulary(self) -> Vocabulary:
        if self.bound is None:
            name = type(self).__name__
            raise UserError(f"objective {name} does not know its tokens yet; use {name}(...).bind(Vocabulary(...))")
        return self.bound

    def measured(self) -> Objective:
        """The objective without what only regularizes training: what evaluation reports."""
        return self

    def at(self, step: int) -> Objective:
        """The objective as it makes the examples of a step, where it changes along the run."""
        return self

    def reading(self, marked: bool) -> Reading:
        """How a prompt is given to the network that was trained for it.

        Args:
            marked: it has masks, sentinels or mode tokens.
        """
        return Reading(self.both_ways, self.answers, self.bos)

    def build(self, config: ModelConfig, execution: Execution | None = None) -> Model:
        """The network to train, with whatever parameters the objective adds to it."""
        from maxpretrain import models

        return models.build(config, execution)

    def raw_length(self, length: int) -> int:
        """Raw tokens that one example of `length` consumes."""
        raise NotImplementedError

    def fields(self, length: int) -> Fields:
        """The example it makes: name -> (shape, dtype)."""
        raise NotImplementedError

    def work(self, model: ModelConfig, length: int) -> list[Work]:
        """The networks that an example of `length` goes through."""
        size = lambda name: fields.get(name, ((0,), ""))[0][0]  # noqa: E731
        fields = self.fields(length)
        return [Work(model, size("tokens"), size("decoder_tokens"), size("labels"))]

    def example(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None, **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """One example from `raw_length` tokens; host side, pure.

        Args:
            tokens: integer [raw_length], or shorter at the end of the text, but never empty.
            rng: seeded by (seed, epoch, window).
            segments: int32 [len(tokens)], 1, 2, … by document; None: one document.
            more: `partner` integer [raw_length], tokens of another document, where the class asks for them.

        Returns:
            The arrays of `fields`, or shorter ones where tokens are few: they are filled up with zeros.
        """
        raise NotImplementedError

    def normalized(self, batch: dict[str, jax.Array], step: jax.Array | None = None) -> dict[str, jax.Array]:
        """The whole batch, before it is cut into microbatches: where a loss of several means needs the number of predictions of
        each beforehand, to be one sum over all rows. Device side, pure.

        Args:
            step: int32 [], steps so far, skipped ones too, for weights that change along the run; None in evaluation, where they
                do not.
        """
        return batch

    def combined(self, means: dict[str, float]) -> float:
        """The loss of a text from the means over it: what `loss` adds up batch by batch, whatever the batches were."""
        return means["loss"]

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        """The loss of a batch; device side, pure. `key` is None in evaluation."""
        raise NotImplementedError
