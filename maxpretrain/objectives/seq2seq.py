"""What the objectives share that turn inputs into targets: which tokens are text, the layout of an example, the loss."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.base import Fields, Loss, Objective, Work

if TYPE_CHECKING:  # pragma: no cover
    import jax
    import numpy as np

    from maxpretrain.config import ModelConfig, Run
    from maxpretrain.models import Output
    from maxpretrain.vocabulary import Vocabulary
else:
    np = lazy("numpy")


OPTIONAL = ("prefix", "token_types")  # what a batch may hold beside; where it lacks them, zeros would say the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2Seq(Objective):
    """Inputs x are read, targets y are written: L = −Σ log p(y[t] | y[<t], x). Base of such objectives.

    An encoder reads x and a decoder writes y; or a decoder alone reads both in one row of `batch.length`, y after x.

    A subclass has `text_length`, `answer_length` and `corrupted`.

    Class attributes:
        title: what errors call it; empty: its class's name.
        shortest: inputs of one token, what stands for another, and eos.

    Reference: Raffel et al. 2020, arXiv:1910.10683, §3.2 (encoder-decoder, and one row in a decoder).
    """

    # none: there is an encoder; prefix: in both directions
    decoder_format: Literal["none", "prefix", "causal"] = (
        "none"  # how a decoder alone reads the inputs before the targets
    )
    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary
    z_loss: float = 0.0  # weight of log²Z, which keeps the normalizer near 1; 1e-4 is usual

    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder-decoder")
    perplexity: ClassVar[bool] = True
    title: ClassVar[str] = ""
    shortest: ClassVar[int] = 3

    @property
    def _title(self) -> str:
        return self.title or type(self).__name__

    @property
    def answers(self) -> bool:  # type: ignore[override]
        return self.decoder_format != "none"

    @property
    def both_ways(self) -> bool:  # type: ignore[override]
        return self.decoder_format == "prefix"

    def validate(self, run: Run) -> None:
        super().validate(run)
        model, length = run.model, run.batch.length
        require_format(self._title, self.decoder_format, model.architecture)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.z_loss < 0:
            raise UserError(f"objective.z_loss is {self.z_loss}; it must be at least 0")
        fields = self.fields(length)
        if model.architecture == "decoder":
            return
        if model.decoder_start_id is None:
            raise UserError(
                "model.decoder_start_id is None; set it to the id that the decoder begins with, such as 0 (T5) or "
                "that of eos (BART)"
            )
        longest = fields["labels"][0][0]
        bounded = model.has_position_table or model.position == "sinusoidal"
        if bounded and longest > model.max_length:
            raise UserError(
                f"objective {self._title} makes targets of {longest} tokens from batch.length {length}, and "
                f"the decoder has positions for {model.max_length}; shorten batch.length or raise model.max_length"
            )

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        if vocabulary.eos_id is None:
            raise UserError(
                f"objective {self._title} ends its inputs and targets with eos, and the tokenizer has none; use one "
                "with </s>, <|endoftext|> or [SEP]"
            )

    def measured(self) -> Seq2Seq:
        return self.replace(label_smoothing=0.0, z_loss=0.0)

    def text_length(self, inputs: int) -> int:
        """Tokens of text that inputs of so many tokens are made of, at most."""
        raise NotImplementedError

    def answer_length(self, inputs: int) -> int:
        """Tokens of the targets, at most, that go with inputs of so many."""
        raise NotImplementedError

    def input_length(self, length: int) -> int:
        """Tokens of the inputs, at most, in an example of `length`: all, or in one row what leaves room for the targets.

        The last target is no input, so a row holds one token less than both.
        """
        return length if self.decoder_format == "none" else _inputs_of_row(self, length)

    def raw_length(self, length: int) -> int:
        return self.text_length(self.input_length(length))

    def target_length(self, length: int) -> int:
        """Tokens of the targets, at most, of an example of `length`."""
        return self.answer_length(self.input_length(length))

    def corrupted(
        self, text: np.ndarray, documents: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets made of a text, which is not empty.

        Args:
            text: int32 [n], without special tokens.
            documents: int32 [n], the number of each token's document, rising.
        """
        raise NotImplementedError

    def fields(self, length: int) -> Fields:
        if self.input_length(length) < self.shortest:
            least = self.shortest + (self.answer_length(self.shortest) - 1 if self.answers else 0)
            raise UserError(
                f"batch.length is {length}, too short for objective {self._title} to corrupt one span; use at least "
                f"{least}"
            )
        rows = ("tokens", "segments", *(("prefix",) if self.both_ways else ()))
        targets = ("places" if self.answers else "decoder_segments", "labels", "weights")
        sizes: dict[str, int] = dict.fromkeys(rows, length) | dict.fromkeys(targets, self.target_length(length))
        kinds = {"weights": "float32", "prefix": "bool"}
        return {name: ((size,), kinds.get(name, "int32")) for name, size in sizes.items()}

    def work(self, model: ModelConfig, length: int) -> list[Work]:
        targets = self.target_length(length)
        return [Work(model, length, 0 if self.answers else targets, targets)]

    def example(
        self, tokens: np.ndarray, rng: np.random.Generator, segments: np.ndarray | None = None, **more: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Inputs and targets. Special tokens of the window, such as the eos that ends a document, are left out.

        Args:
            tokens: integer [n].
            rng: what the corruption is drawn from.
            segments: int32 [n], 1, 2, … by document, 0 for padding at the end; None: one document.

        Returns:
            "tokens" and "segments", int32 [S], the inputs; "labels", "weights" (float32) and "decoder_segments", [U],
            the targets, empty where there is nothing to predict. Segments and weights are 1. What the decoder reads is
            the labels one place later; `loss` makes it.
            In one row "tokens" are inputs and targets without the last, "prefix", bool, is true in the inputs, and
            "places", int32 [U], are those from which the labels are predicted: from the last input on.
        """
        text, documents = self._text(np.asarray(tokens, np.int32), segments)
        inputs, targets = self.corrupted(text, documents, rng) if len(text) else (text, text)
        made = {"labels": targets, "weights": np.ones(len(targets), np.float32)}
        if not self.answers:
            made |= {"tokens": inputs, "decoder_segments": np.ones(len(targets), np.int32)}
        else:
            made["tokens"] = np.concatenate([inputs, targets[:-1]])
            made["places"] = np.arange(len(targets), dtype=np.int32) + (len(inputs) - 1)
        if self.both_ways:
            made["prefix"] = np.arange(len(made["tokens"])) < len(inputs)
        return made | {"segments": np.ones(len(made["tokens"]), np.int32)}

    @cached_property
    def _is_text(self) -> np.ndarray:
        """bool [V]: which tokens are."""
        words = self.vocabulary
        control = {words.bos_id, words.eos_id, words.mask_id, *words.sentinels, *words.modes, *words.fim} - {None}
        text = ~words.is_special
        text[list(control)] = False
        return text

    def _text(self, tokens: np.ndarray, segments: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        documents = np.ones(len(tokens), np.int32) if segments is None else segments
        keep = self._is_text[tokens] & (documents > 0)
        return tokens[keep], documents[keep]

    def framed(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both with eos at the end."""
        eos = np.array([self.vocabulary.eos_id], np.int32)
        return np.concatenate([inputs, eos]), np.concatenate([targets, eos])

    def loss(self, model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Loss:
        from maxpretrain.objectives.cross_entropy import label_loss

        output = forward(model, params, batch, key)
        return label_loss(model, params, output, batch, label_smoothing=self.label_smoothing, z_loss=self.z_loss)


@functools.lru_cache
def _inputs_of_row(objective: Seq2Seq, length: int) -> int:
    return bisect.bisect_right(range(1, length + 1), length + 1, key=lambda n: n + objective.answer_length(n))


def require_format(title: str, decoder_format: str, architecture: str) -> None:
    """Raises UserError where the format of the inputs is not one that the network reads."""
    if architecture == "decoder" and decoder_format == "none":
        raise UserError(
            f"objective {title} on a decoder needs an input format; set objective.decoder_format to prefix (inputs read in both "
            "directions) or causal, or take an encoder-decoder"
        )
    if architecture == "encoder-decoder" and decoder_format != "none":
        raise UserError(
            f"objective.decoder_format is {decoder_format}, for a decoder alone, and model.architecture is encoder-decoder; "
            "leave it none"
        )


def shifted(labels: jax.Array, start: int) -> jax.Array:
    """What a decoder reads to write `labels`, int32 [B, U]: the start token, then all labels but the last."""
    import jax.numpy as jnp

    return jnp.concatenate([jnp.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)


def forward(model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Output:
    """The forward pass of a batch: as in `Seq2Seq.fields`, or of one network that reads "tokens", whichever of "positions",
    "segments", "prefix" and "token_types" are there.
    """
    if "decoder_segments" not in batch:
        given = {name: batch[name] for name in ("positions", "segments", *OPTIONAL) if name in batch}
        return model.apply(params, batch["tokens"], key=key, **given)
    return model.apply(
        params,
        batch["tokens"],
        segments=batch["segments"],
        key=key,
        decoder_tokens=shifted(batch["labels"], model.config.decoder_start_id),
        decoder_segments=batch["decoder_segments"],
    )
