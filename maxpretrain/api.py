"""A trained network in Python: `maxpretrain.load`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from maxpretrain.config import Run
from maxpretrain.errors import UserError
from maxpretrain.rundir import RunDirectory

if TYPE_CHECKING:  # pragma: no cover
    from maxpretrain.data.tokenizer import Tokenizer
    from maxpretrain.fill import Candidate, FillMask
    from maxpretrain.generate import Generator, Stream
    from maxpretrain.models import Model

Array = Any  # of numpy, of jax, or what numpy makes one of


def load(path: str | os.PathLike[str], step: int | None = None) -> LoadedRun:
    """A run's network with its parameters, ready to use.

    Args:
        path: a run directory, a run's name under runs/, or a Hugging Face directory.
        step: of the checkpoint; None: the last one.

    Raises:
        UserError: there is no such run, or a directory of others that cannot be read.
        StorageError: there is no such checkpoint, or it is damaged.
    """
    directory = RunDirectory.open(path)
    step = directory.step(step)
    return LoadedRun(directory, step, directory.params(step), directory.tokenizer)


@dataclasses.dataclass(repr=False)
class LoadedRun:
    """What `load` returns.

    Attributes:
        directory: where it is from.
        step: of the checkpoint.
        params: nested dict of jax.Array.
        tokenizer: as it was trained with; None where there is none.
    """

    directory: RunDirectory
    step: int
    params: dict[str, Any]
    tokenizer: Tokenizer | None

    def __repr__(self) -> str:  # not the parameters, which a notebook would print in full
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"LoadedRun({str(self.directory.path)!r}, step={self.step}, {size:,} parameters, {self.tokenizer})"

    @property
    def config(self) -> Run:
        return self.directory.config

    @cached_property
    def model(self) -> Model:
        """The network as functions of `params`."""
        return self.directory.model(scan=True)

    def logits(
        self,
        tokens: Array,
        *arrays: Array | None,
        decoder_tokens: Array | None = None,
        mask: Array | None = None,
        decoder_mask: Array | None = None,
    ) -> np.ndarray:
        """Scores of the tokens of the vocabulary: of every next token, or of an encoder for every place.

        `logits(tokens, mask)`, or of an encoder-decoder `logits(tokens, decoder_tokens, mask, decoder_mask)`.

        Args:
            tokens: int [B, T], of numpy or jax.
            decoder_tokens: int [B, U], what an encoder-decoder's decoder reads; its first is `config.model.decoder_start_id`.
            mask, decoder_mask: [B, T] and [B, U], 1 for real tokens and 0 for padding, on either side. Positions count real
                tokens only, and what stands at padding has no influence on them. None: all are real.

        Returns:
            float32 [B, T, V], of an encoder-decoder [B, U, V]; nothing is said about the values at padding.

        Raises:
            UserError: a shape, an id or a length does not fit the model, or it has no language model head.
        """
        both = self.config.model.architecture == "encoder-decoder"
        names = ("decoder_tokens", "mask", "decoder_mask") if both else ("mask",)
        given = {"decoder_tokens": decoder_tokens, "mask": mask, "decoder_mask": decoder_mask}
        if len(arrays) > len(names) or any(given[name] is not None for name in names[: len(arrays)]):
            raise UserError(f"logits of this model takes tokens, {', '.join(names)}, each once; name them")
        given |= dict(zip(names, arrays, strict=False))
        if both and given["decoder_tokens"] is None:
            raise UserError("logits of an encoder-decoder needs decoder_tokens: run.logits(tokens, decoder_tokens)")
        heads = self.config.model.heads
        if "lm" not in heads:
            raise UserError(
                f'model.heads are {", ".join(heads) or "none"}; without "lm" there are no logits; use run.outputs'
            )
        return self.outputs(tokens, **given)["logits"]

    def outputs(
        self,
        tokens: Array,
        mask: Array | None = None,
        token_types: Array | None = None,
        *,
        decoder_tokens: Array | None = None,
        decoder_mask: Array | None = None,
    ) -> dict[str, np.ndarray]:
        """Everything that the network says about a batch.

        Args:
            tokens, mask, decoder_tokens, decoder_mask: as in `logits`.
            token_types: int [B, T], which kind of segment each token is in, for networks that have such; None: all of kind 0.

        Returns:
            float32, by name: "hidden" [B, T, D], after the last norm; and of the heads that there are "logits" [B, T, V],
            "pooled" [B, D], "pair_logits" [B, 2], "replaced_logits" [B, T], "sequence_logits" [B, labels], "token_logits"
            [B, T, labels], "values" [B, T]. Of an encoder-decoder they are the decoder's, and "memory" [B, T, D] the encoder's;
            without decoder_tokens there is "hidden" alone, the encoder's.
        """
        config = self.config.model
        ids, real = self._checked(tokens, mask)
        given = {"tokens": ids, "real": real}
        if token_types is not None:
            given["token_types"] = self._checked_types(token_types, ids)
        if decoder_tokens is not None or decoder_mask is not None:
            if config.architecture != "encoder-decoder" or decoder_tokens is None:
                have = "decoder_mask" if decoder_tokens is None else "decoder_tokens"
                without = (
                    "decoder_tokens" if config.architecture == "encoder-decoder" else "a network that has use for it"
                )
                raise UserError(f"{have} was given without {without}")
            given["decoder_tokens"], given["decoder_real"] = self._checked(decoder_tokens, decoder_mask, "decoder_")
            if len(ids) != len(given["decoder_tokens"]):
                raise UserError(
                    f"tokens have {len(ids)} rows and decoder_tokens {len(given['decoder_tokens'])}; give as many"
                )
        return jax.device_get(self._forward(self.params, given))

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stream: Stream | None = None,
        suffix: str | Sequence[str] | None = None,
    ) -> list[str]:
        """Continuations of texts, without the texts; of an encoder-decoder, or a decoder that learned to (`answers`), answers
        to them; see `maxpretrain.generate.Generator`.

        With a suffix, or one for each prompt, a decoder that learned to fill in the middle makes what comes between.
        Where a text to be answered has sentinels, the text itself, with spans in the place of these.
        Of an encoder the texts themselves, with tokens in the place of their masks (`maxpretrain.fill.FillMask.filled`), for
        which `max_new_tokens` has no meaning.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of them, such as run.generate([text])")
        architecture = self.config.model.architecture
        if suffix is not None and architecture != "decoder":
            raise UserError(
                f"a suffix is for a decoder that fills in the middle, and this network is an {architecture}; leave it "
                "out"
            )
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        if self.config.model.architecture == "encoder":
            texts = self._fill_mask.filled(self.params, prompts, **how)
            for index, text in enumerate(texts if stream else ()):
                stream(index, text)
            return texts
        from maxpretrain.infill import is_filled, said

        if suffix is None and any(is_filled(self._generator, prompt) for prompt in prompts):
            texts = said(self._generator, self.params, prompts, max_new_tokens=max_new_tokens, **how)
            for index, text in enumerate(texts if stream else ()):
                stream(index, text)
            return texts
        how |= {"max_new_tokens": max_new_tokens, "stream": stream}
        how["suffixes"] = [suffix] * len(prompts) if isinstance(suffix, str) else suffix
        return self._generator(self.params, prompts, **how)

    def fill(self, texts: Sequence[str], top_k: int = 5) -> list[list[list[Candidate]]]:
        """What an encoder would put in the place of each mask: for each text, for each mask, the likeliest tokens with their
        probabilities; see `maxpretrain.fill.FillMask`.
        """
        if isinstance(texts, str):
            raise UserError("texts is one text; give a list of them, such as run.fill([text])")
        return self._fill_mask(self.params, texts, top_k)

    def answers(self, prompt: str) -> bool:
        """Whether the network answers this prompt, rather than to go on from it."""
        return self._generator.reading(prompt).answers

    @cached_property
    def _generator(self) -> Generator:
        from maxpretrain.generate import Generator

        return Generator(self.model, self._with_tokenizer(), self.config.objective)

    @cached_property
    def _fill_mask(self) -> FillMask:
        from maxpretrain.fill import FillMask

        return FillMask(self.model, self._with_tokenizer())

    def _with_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                f"{self.directory.path} has no tokenizer, so texts mean nothing to it; use run.logits with token ids"
            )
        return self.tokenizer

    @cached_property
    def _forward(self) -> Callable[[Any, dict[str, np.ndarray | None]], dict[str, jax.Array]]:
        model = self.model

        def forward(params: Any, given: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
            tokens, real = given["tokens"], given["real"]
            positions, segments = _placed(real)
            more = {"token_types": given["token_types"]} if "token_types" in given else {}
            if model.config.architecture == "encoder-decoder":
                # Without tokens for the decoder any will do: what is not asked for is not computed.
                more["decoder_tokens"] = given.get("decoder_tokens", jnp.zeros((len(tokens), 1), jnp.int32))
                real = given.get("decoder_real")
                more["decoder_positions"], more["decoder_segments"] = _placed(real)
            output = model.apply(params, tokens, positions, segments, **more)
            if output.memory is not None and "decoder_tokens" not in given:
                return {"hidden": output.memory.astype(jnp.float32)}
            made = {"hidden": output.hidden} | model.head_outputs(params, output.hidden, real)
            if output.memory is not None:
                made["memory"] = output.memory
            if "lm" in model.config.heads:
                made["logits"] = model.logits(params, output.hidden)
            return {name: value.astype(jnp.float32) for name, value in made.items()}

        return jax.jit(forward)

    def _checked(self, tokens: Array, mask: Array | None, of: str = "") -> tuple[np.ndarray, np.ndarray | None]:
        """int32 [B, T] and bool [B, T], or one sentence that says what is wrong with them; `of` comes before their names."""
        ids, config = np.asarray(tokens), self.config.model
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"{of}tokens are {ids.dtype} of shape {ids.shape}; give integers of shape [batch, length]")
        for wrong in ids[(ids < 0) | (ids >= config.vocab_size)][:1]:
            raise UserError(f"{of}tokens hold the id {wrong}; the model's vocabulary is 0 to {config.vocab_size - 1}")
        real = None
        if mask is not None:
            given = np.asarray(mask)
            if given.shape != ids.shape or not np.isin(given, (0, 1)).all():
                raise UserError(
                    f"the {of}mask has shape {given.shape} and {of}tokens {ids.shape}; give 1 for each real token and 0 for padding"
                )
            real = given.astype(bool)
        longest = int((np.ones_like(ids) if real is None else real).sum(axis=1).max(initial=0))
        if (config.has_position_table or config.mask_decoder) and longest > config.max_length:
            raise UserError(
                f"{longest} tokens in a row are more than the {config.max_length} positions that the model learned; cut them"
            )
        return ids.astype(np.int32), real

    def _checked_types(self, token_types: Array, ids: np.ndarray) -> np.ndarray:
        """int32 [B, T]."""
        config, types = self.config.model, np.asarray(token_types)
        if not config.token_types:
            article = "a" if config.architecture == "decoder" else "an"
            raise UserError(f"token_types were given, and {article} {config.architecture} has none; leave them out")
        if types.shape != ids.shape or not np.issubdtype(types.dtype, np.integer):
            raise UserError(
                f"token_types are {types.dtype} of shape {types.shape}; give integers of shape {ids.shape}, as tokens"
            )
        for wrong in types[(types < 0) | (types >= config.token_types)][:1]:
            raise UserError(f"token_types hold {wrong}; the model has 0 to {config.token_types - 1}")
        return types.astype(np.int32)


def _placed(real: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Positions and segments, int32 [B, T], of tokens of which `real` are no padding; None: all, from 0 on."""
    if real is None:
        return None, None
    segments = real.astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(segments, axis=1, dtype=jnp.int32) - 1, 0), segments
