"""UL2: a mixture of seven denoisers, each announced by a mode token."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from maxpretrain.errors import UserError
from maxpretrain.lazy import lazy
from maxpretrain.objectives.mixture import Mixed, require_shares
from maxpretrain.objectives.span_corruption import Counts, SpanCorruption

if TYPE_CHECKING:  # pragma: no cover
    import numpy as np

    from maxpretrain.config import Run
    from maxpretrain.vocabulary import Vocabulary
else:
    np = lazy("numpy")

# (kind, mean span, density); of S the span is the end of the text.
DENOISERS = (
    ("r", 3.0, 0.15),
    ("r", 8.0, 0.15),
    ("x", 3.0, 0.5),
    ("x", 8.0, 0.5),
    ("x", 64.0, 0.15),
    ("x", 64.0, 0.5),
    ("s", None, 0.25),
)
MODES = {"r": 0, "x": 1, "s": 2}  # places of [NLU], [NLG] and [S2S] in `Vocabulary.modes`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser(SpanCorruption):
    """One of UL2's: span corruption with a mode token before the inputs.

    Of kind "s" it is a prefix language model: the encoder reads the first part of the text, the decoder writes the
    rest; there are no sentinels.
    """

    kind: str = "r"  # r, x or s
    mode_tokens: bool = True  # the inputs begin with the mode token of the kind

    title: ClassVar[str] = "UL2"

    @property
    def shortest(self) -> int:  # type: ignore[override]
        return super().shortest + self.mode_tokens

    def published(self, raw: int) -> Counts:
        counts = super().published(raw)
        return counts._replace(spans=0) if self.kind == "s" else counts

    def counts(self, raw: int) -> Counts:
        counts = super().counts(raw)
        return counts._replace(spans=0) if self.kind == "s" else counts

    def text_length(self, inputs: int) -> int:
        return super().text_length(inputs - self.mode_tokens)

    def corrupted(
        self, text: np.ndarray, documents: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.kind == "s" and len(text) > 1:
            kept = len(text) - self.counts(len(text)).noise
            inputs, targets = self.framed(text[:kept], text[kept:])
        else:
            inputs, targets = super().corrupted(text, documents, rng)
        if self.mode_tokens:
            mode = np.array([self.vocabulary.modes[MODES[self.kind]]], np.int32)
            inputs = np.concatenate([mode, inputs])
        return inputs, targets


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2(Mixed):
    """Seven denoisers, drawn for each example: regular R (spans of 3 or 8 tokens, 15 % of the text), extreme X (spans of
    3, 8 or 64, 50 %, or of 64, 15 %), sequential S (the last 25 % from what comes before).

    The inputs begin with [NLU] (R), [NLG] (X) or [S2S] (S). Metrics loss_r, loss_x, loss_s.

    Reference: Tay et al. 2022, arXiv:2205.05131, §3.1.2 and table 1. The code of its appendix cuts the text of S
    anywhere; here it is the table's share, exact as those of the others.
    """

    weights: tuple[float, ...] = ()  # shares of R3 R8 X3 X8 X64-15% X64-50% S; they add up to 1; empty: equal
    mode_tokens: bool = True  # the inputs begin with a mode token
    num_sentinels: int = 128  # sentinels of a tokenizer that is trained for it; 128 serve batch.length 512
    # none: there is an encoder; prefix: in both directions
    decoder_format: Literal["none", "prefix", "causal"] = (
        "none"  # how a decoder alone reads the inputs before the targets
    )
    label_smoothing: float = 0.0  # share of the target spread evenly over the vocabulary
    z_loss: float = 0.0  # weight of log²Z, which keeps the normalizer near 1; 1e-4 is usual

    which: ClassVar[str] = "denoiser"
    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder-decoder")
    heads: ClassVar[tuple[str, ...]] = ("lm",)

    @property
    def parts(self) -> tuple[Denoiser, ...]:
        names = ("mode_tokens", "num_sentinels", "decoder_format", "label_smoothing", "z_loss")
        same = {name: getattr(self, name) for name in names}
        return tuple(
            Denoiser(kind=kind, mean_span=span or 1.0, density=density, **same) for kind, span, density in DENOISERS
        )

    @property
    def titles(self) -> tuple[str, ...]:
        return tuple(kind for kind, *_ in DENOISERS)

    @property
    def shares(self) -> tuple[float, ...]:
        return self.weights or (1.0 / len(DENOISERS),) * len(DENOISERS)

    def validate(self, run: Run) -> None:
        if self.weights:
            require_shares(self.weights, len(DENOISERS), "objective.weights")
        super().validate(run)

    def symbols(self) -> tuple[str, ...]:
        from maxpretrain import vocabulary

        return (*(vocabulary.MODES if self.mode_tokens else ()), *super().symbols())

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        super().check_vocabulary(vocabulary)
        if self.mode_tokens and not vocabulary.modes:
            raise UserError(
                "objective UL2 begins its inputs with [NLU], [NLG] or [S2S], and the tokenizer has not all of them; "
                "leave tokenizer.path out and let the run train its own, or set objective.mode_tokens to false"
            )

    def measured(self) -> UL2:
        return self.replace(label_smoothing=0.0, z_loss=0.0)
