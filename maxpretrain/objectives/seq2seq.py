"""What the objectives of encoder-decoders share: which tokens are text, the layout of an example, and the loss."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seq2Seq(Objective):
    """The encoder reads inputs x, the decoder writes targets y: L = −Σ log p(y[t] | y[<t], x). Base of such objectives.

    A subclass has `raw_length`, `target_length` and `corrupted`.

    Class attributes:
        title: what errors call it; empty: its class's name.
        shortest: inputs of one token, what stands for another, and eos.
    """

    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary
    z_loss: float = 0.0  # weight of log²Z, which keeps the normalizer near 1; 1e-4 is usual

    architectures: ClassVar[tuple[str, ...]] = ("encoder-decoder",)
    perplexity: ClassVar[bool] = True
    title: ClassVar[str] = ""
    shortest: ClassVar[int] = 3

    @property
    def _title(self) -> str:
        return self.title or type(self).__name__

    def validate(self, run: Run) -> None:
        super().validate(run)
        model, length = run.model, run.batch.length
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1)")
        if self.z_loss < 0:
            raise UserError(f"objective.z_loss is {self.z_loss}; it must be at least 0")
        if model.decoder_start_id is None:
            raise UserError(
                "model.decoder_start_id is None; set it to the id that the decoder begins with, such as 0 (T5) or "
                "that of eos (BART)"
            )
        longest = self.fields(length)["labels"][0][0]
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

    def target_length(self, length: int) -> int:
        """Tokens of the targets, at most, that go with inputs of `length`."""
        raise NotImplementedError

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
        if length < self.shortest:
            raise UserError(
                f"batch.length is {length}, too short for objective {self._title} to corrupt one span; use at least "
                f"{self.shortest}"
            )
        sizes = {"tokens": length, "segments": length} | dict.fromkeys(
            ("decoder_segments", "labels", "weights"), self.target_length(length)
        )
        return {name: ((size,), "float32" if name == "weights" else "int32") for name, size in sizes.items()}

    def work(self, model: ModelConfig, length: int) -> list[Work]:
        targets = self.target_length(length)
        return [Work(model, length, targets, targets)]

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
        """
        text, documents = self._text(np.asarray(tokens, np.int32), segments)
        inputs, targets = self.corrupted(text, documents, rng) if len(text) else (text, text)
        return {
            "tokens": inputs,
            "segments": np.ones(len(inputs), np.int32),
            "decoder_segments": np.ones(len(targets), np.int32),
            "labels": targets,
            "weights": np.ones(len(targets), np.float32),
        }

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

        output = decoded(model, params, batch, key)
        return label_loss(model, params, output, batch, label_smoothing=self.label_smoothing, z_loss=self.z_loss)


def shifted(labels: jax.Array, start: int) -> jax.Array:
    """What a decoder reads to write `labels`, int32 [B, U]: the start token, then all labels but the last."""
    import jax.numpy as jnp

    return jnp.concatenate([jnp.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)


def decoded(model: Any, params: Any, batch: dict[str, jax.Array], key: jax.Array | None) -> Output:
    """The forward pass of a batch as in `Seq2Seq.fields`."""
    return model.apply(
        params,
        batch["tokens"],
        segments=batch["segments"],
        key=key,
        decoder_tokens=shifted(batch["labels"], model.config.decoder_start_id),
        decoder_segments=batch["decoder_segments"],
    )
