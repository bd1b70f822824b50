"""What an encoder puts in the place of masks in a text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain.data.tokenizer import Tokenizer
from maxpretrain.errors import Diverged, UserError
from maxpretrain.generate import bucket
from maxpretrain.models import Model, build
from maxpretrain.sampling import NOT_FINITE, Sampling, draw, settings
from maxpretrain.vocabulary import MASKS, ends_of


class Candidate(NamedTuple):
    """A token in the place of a mask.

    Attributes:
        id: of the token.
        text: what it adds to the text; its name where that is nothing.
        probability: among all tokens of the tokenizer.
    """

    id: int
    text: str
    probability: float


class _Asked(NamedTuple):
    """Texts as arrays: `tokens` int32 [B, T], `real` bool [B, T], `places` int32 [B, N] of the masks (the first again where a
    text has fewer); and `counts`, how many masks each text has, and `lengths`, how many tokens.
    """

    tokens: np.ndarray
    real: np.ndarray
    places: np.ndarray
    counts: list[int]
    lengths: list[int]


class FillMask:
    """Fills masks, each as if it were alone: the others stay masks. Keeps what it compiled for the next call.

    A text is read as one segment, from the tokenizer's bos to its eos where it has them ([CLS] and [SEP] in BERT).

    Args:
        model: an encoder with a language model head, or with a generator beside it that has one (ELECTRA).
        tokenizer: the one it was trained with, with a mask: a special token or user symbol of a name in `MASKS`.

    Raises:
        UserError: the network is another, the tokenizer has no mask, or it has ids that the model has not.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer):
        config, self._plain = model.speaking
        if config.architecture != "encoder":
            raise UserError(f"masks are filled by an encoder, and model.architecture is {config.architecture}")
        if "lm" not in config.heads:
            heads = ", ".join(config.heads) or "none"
            raise UserError(f'model.heads are {heads}; without "lm" there is nothing to fill masks with')
        if config.vocab_size is None or tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {config.vocab_size}; use the tokenizer that it "
                "was trained with"
            )
        self.mask, self.mask_id = _mask_of(tokenizer)
        self._model = build(config, dataclasses.replace(model.execution, scan=True, remat="none"))
        self._tokenizer = tokenizer
        self._answer = jax.jit(self._answered, static_argnames=("mode", "count"))

    def __call__(self, params: Any, texts: Sequence[str], top_k: int = 5) -> list[list[list[Candidate]]]:
        """The likeliest tokens for each mask of each text.

        Args:
            params: of the model; on one device or spread over a mesh.
            texts: each with at least one mask, written as `self.mask`.
            top_k: candidates a mask; all tokens where that are fewer.

        Returns:
            For each text, for each of its masks from left to right, candidates from likely to unlikely.

        Raises:
            UserError: a text has no mask or is longer than the model's positions, or `top_k` is below 1.
            Diverged: the logits are not finite.
        """
        if top_k < 1:
            raise UserError(f"top_k is {top_k}; it must be at least 1")
        if not texts:
            return []
        mode, sampling = settings(self._tokenizer.vocab_size, 0.0, None, None, 0)
        asked = self._asked(texts)
        count = min(top_k, self._tokenizer.vocab_size)
        ids, probabilities, _ = self._run(params, asked, sampling, mode, count)
        return [
            [
                [Candidate(int(i), self._text(int(i)), float(p)) for i, p in zip(*found, strict=True)]
                for found in zip(ids[row, :masks], probabilities[row, :masks], strict=True)
            ]
            for row, masks in enumerate(asked.counts)
        ]

    def filled(
        self,
        params: Any,
        texts: Sequence[str],
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[str]:
        """The texts with a token in the place of each mask; settings as those of `maxpretrain.generate.Generator`."""
        mode, sampling = settings(self._tokenizer.vocab_size, temperature, top_k, top_p, seed)
        if not texts:
            return []
        asked = self._asked(texts)
        _, _, drawn = self._run(params, asked, sampling, mode, 1)
        made = []
        for row, (masks, length) in enumerate(zip(asked.counts, asked.lengths, strict=True)):
            ids = asked.tokens[row, :length].copy()
            ids[asked.places[row, :masks]] = drawn[row, :masks]
            begins, ends = self._ends
            made.append(self._tokenizer.decode(ids[len(begins) : length - len(ends)]))
        return made

    def _run(self, params: Any, asked: _Asked, sampling: Sampling, mode: str, count: int) -> Any:
        how = {"mode": mode, "count": count}
        found = jax.device_get(self._answer(params, asked.tokens, asked.real, asked.places, sampling, **how))
        for row in np.flatnonzero((found[2] == NOT_FINITE).any(axis=1))[:1]:
            raise Diverged(
                f"the model's logits for the masks of text {row} are not finite: its training diverged; use an earlier checkpoint"
            )
        return found

    def _answered(
        self,
        params: Any,
        tokens: jax.Array,
        real: jax.Array,
        places: jax.Array,
        sampling: Sampling,
        mode: str,
        count: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """For N places of each row: the `count` likeliest tokens [B, N, count], their probabilities, and one drawn [B, N]."""
        segments = real.astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(segments, axis=1, dtype=jnp.int32) - 1, 0)
        params = self._plain(params)
        hidden = self._model.apply(params, tokens, positions, segments).hidden
        hidden = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
        # Never one beyond the tokenizer's ids, which a padded embedding has too.
        logits = self._model.logits(params, hidden)[..., : self._tokenizer.vocab_size]
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(logits), count)
        number = jnp.broadcast_to(jnp.arange(places.shape[1], dtype=jnp.int32)[:, None], places.shape[::-1])
        drawn = jax.vmap(lambda of, n: draw(of, n, sampling, mode), in_axes=(1, 0), out_axes=1)(logits, number)
        return ids, probabilities, drawn

    @functools.cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """What comes before and after the ids of a text."""
        bos, eos = ends_of(self._tokenizer)
        return [] if bos is None else [bos], [] if eos is None else [eos]

    def _asked(self, texts: Sequence[str]) -> _Asked:
        rows = [self._ids(text) for text in texts]
        config, longest = self._model.config, max(map(len, rows))
        bounded = config.is_bounded
        if bounded and longest > config.max_length:
            raise UserError(f"a text has {longest} tokens, and the model positions for {config.max_length}; shorten it")
        length = min(bucket(longest), config.max_length) if bounded else bucket(longest)
        where = [np.flatnonzero(ids == self.mask_id) for ids in rows]
        most = 1 << (max(map(len, where)) - 1).bit_length()
        tokens = np.full((len(rows), length), self._tokenizer.pad_id or 0, np.int32)
        real = np.zeros(tokens.shape, bool)
        places = np.zeros((len(rows), most), np.int32)
        for row, (ids, at) in enumerate(zip(rows, where, strict=True)):
            tokens[row, : len(ids)], real[row, : len(ids)] = ids, True
            places[row] = at[0]
            places[row, : len(at)] = at
        return _Asked(tokens, real, places, [len(at) for at in where], [len(ids) for ids in rows])

    def _ids(self, text: str) -> np.ndarray:
        text = with_mask(text, self.mask)
        wanted = text.count(self.mask)
        if not wanted:
            shown = text if len(text) <= 40 else f"{text[:39]}…"
            raise UserError(f'"{shown}" has no mask; write {self.mask} where a token is to be filled in')
        ids = self._tokenizer.encode_marked(text)
        if np.count_nonzero(ids == self.mask_id) != wanted:  # it takes the mask for plain text
            parts = [self._tokenizer.encode(part) for part in text.split(self.mask)]
            ids = np.concatenate([parts[0], *(a for part in parts[1:] for a in ([self.mask_id], part))])
        begins, ends = self._ends
        return np.concatenate([begins, ids, ends]).astype(np.int32)

    def _text(self, id: int) -> str:
        return self._tokenizer.decode([id]) or self._tokenizer.piece(id)


def with_mask(text: str, mask: str) -> str:
    """The text with the mask by the name that the tokenizer has for it, whichever of the usual ones it was written with."""
    for name in MASKS:
        text = text.replace(name, mask)
    return text


def _mask_of(tokenizer: Tokenizer) -> tuple[str, int]:
    """The mask's name and id."""
    for name in MASKS:
        found = tokenizer.id_of(name)
        if found is not None:
            return name, found
    raise UserError(
        f"the {tokenizer.kind} tokenizer has no mask ({' or '.join(MASKS)}); a run whose objective masks trains one that has"
    )
