"""Continuations of texts by a decoder, and answers to them, with a cache of keys and values."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxpretrain.data.tokenizer import Tokenizer
from maxpretrain.decoding import CHUNK, NOTHING, Programs
from maxpretrain.errors import Diverged, UserError
from maxpretrain.models import Model, build
from maxpretrain.objectives.base import Objective, Reading
from maxpretrain.prompts import Row, fim_ids
from maxpretrain.sampling import NOT_FINITE, Sampling, settings
from maxpretrain.vocabulary import is_marked

Stream = Callable[[int, str], None]

PIECE = 256  # tokens of a long prompt that go through the network at one time, at most


@dataclasses.dataclass
class _Batch:
    """One call: rows that are continued together, each as it would be alone."""

    programs: Programs
    params: Any
    rows: list[Row]
    eos_id: int | None
    limit: int  # new tokens a row
    capacity: int  # of the cache, in tokens a row
    mode: str
    sampling: Sampling
    stream: Stream | None
    source_length: int  # of prompts with padding, for the encoder; 0: there is none
    both_ways: bool  # the network may read a prompt so, which then has to come in one piece

    def run(self) -> None:
        self._state = self.programs.empty(len(self.rows), self.capacity)
        if self.source_length:
            tokens, segments = np.zeros((2, len(self.rows), self.source_length), np.int32)
            for index, row in enumerate(self.rows):
                tokens[index, : len(row.source)], segments[index, : len(row.source)] = row.source, 1
            self._state = self.programs.encode(self.params, self._state, tokens, segments)
        count = 1 if self.stream else CHUNK
        while not all(row.finished for row in self.rows):
            starting = self._starting()
            longest = max((len(context) for context in starting.values()), default=0)
            if longest > CHUNK or (longest and self.both_ways):
                self._prefill(starting, longest)
                continue
            begun = time.perf_counter()
            self._chunk(starting, max(count, longest))
            if self.stream:  # text that arrives a few times a second is smooth enough
                count = min(2 * count, CHUNK) if time.perf_counter() - begun < 0.05 else max(count // 2, 1)

    def _starting(self) -> dict[int, list[int]]:
        """Rows at their beginning, or at the end of the cache, which go on from the last half of it; and their contexts."""
        starting = {}
        for index, row in enumerate(self.rows):
            full = len(row.context) > self.capacity
            if full:
                row.start = len(row.ids) - max(self.capacity // 2, 1)
            if not row.finished and (full or not row.number):
                starting[index] = row.context
        return starting

    def _chunk(self, starting: dict[int, list[int]], count: int) -> None:
        given = np.full((len(self.rows), CHUNK + 1), NOTHING, np.int32)
        for index, context in starting.items():
            given[index, : len(context)] = context
        self._state, out = self.programs.chunk(
            self.params, self._state, given, np.int32(count), np.int32(self.limit), self.sampling, mode=self.mode
        )
        self._take(out)

    def _prefill(self, starting: dict[int, list[int]], longest: int) -> None:
        piece = min(bucket(longest), self.capacity if self.both_ways else PIECE, self.capacity)
        lengths, prefixes = np.zeros((2, len(self.rows)), np.int32)
        tokens = np.zeros((len(self.rows), -(-longest // piece) * piece), np.int32)
        for index, context in starting.items():
            lengths[index] = len(context)
            prefixes[index] = len(context) if self.rows[index].both_ways else 0
            tokens[index, : len(context)] = context
        for start in range(0, tokens.shape[1], piece):
            part = tokens[:, start : start + piece]
            self._state, out = self.programs.prefill(
                self.params, self._state, part, np.int32(start), lengths, prefixes, self.sampling, mode=self.mode
            )
            self._take(out)

    def _take(self, out: jax.Array) -> None:
        """Adds new tokens [B, n] to their rows."""
        for index, (row, tokens) in enumerate(zip(self.rows, jax.device_get(out).tolist(), strict=True)):
            for token in tokens:
                if token == NOT_FINITE:
                    raise Diverged(
                        f"the model's logits after {len(row.ids)} tokens of prompt {index} are not finite: its training diverged; use "
                        "an earlier checkpoint"
                    )
                if token == NOTHING:
                    continue
                full = row.whole and len(row.ids) == self.capacity
                text = row.add(token, ends=token == self.eos_id, last=full or row.number + 1 == self.limit)
                if text and self.stream:
                    self.stream(index, text)


class Generator:
    """Continues texts, or answers them; keeps what it compiled for the next call.

    Args:
        model: a decoder, which continues a prompt; or an encoder-decoder, whose encoder reads it, with eos at its end where
            the tokenizer has one, and whose decoder begins with `config.decoder_start_id`. How it is run here (one loop over
            layers, which compiles fastest) is chosen apart from how it is trained.
        tokenizer: the one it was trained with.
        objective: what the model was trained for, which says how it reads a prompt (`Objective.reading`); None: as it stands.

    Raises:
        UserError: the tokenizer has ids that the model has not.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, objective: Objective | None = None):
        size = model.config.vocab_size
        if size is None or tokenizer.vocab_size > size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {size}; use the tokenizer that it was trained with"
            )
        self._model = build(model.config, dataclasses.replace(model.execution, scan=True, remat="none"))
        self.tokenizer = tokenizer
        self._objective = objective or Objective()
        readings = [self._objective.reading(marked) for marked in (False, True)]
        self._both_ways = model.config.architecture == "decoder" and any(reading.both_ways for reading in readings)
        self._programs: dict[NamedSharding | None, Programs] = {}

    def __call__(
        self,
        params: Any,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stream: Stream | None = None,
        suffixes: Sequence[str] | None = None,
    ) -> list[str]:
        """Continuations, without their prompts, or answers; each as it would be alone.

        Where positions are a table, a text that outgrows it goes on from the last half of the window; an answer and a text with
        a suffix end there.

        Args:
            params: of the model; on one device or spread over a mesh.
            prompts: texts; an empty one to go on from begins with the tokenizer's bos, or eos where it has none.
            max_new_tokens: of each continuation, which ends earlier at eos.
            temperature: 0 takes the likeliest token, and makes no use of the rest.
            top_k: draw among the so many likeliest only.
            top_p: draw among the likeliest of total probability p only.
            seed: the same one draws the same texts.
            stream: called with (index of the prompt, text) as text arrives, in whole characters.
            suffixes: for each prompt what comes after the text that is to be made, where a decoder learned to fill in
                the middle.

        Raises:
            UserError: a setting is out of range, a prompt is empty and the tokenizer has neither bos nor eos, a prompt is
                longer than the positions of an encoder, the network generates nothing: it is an encoder, or lacks a head
                or a start; or it takes no suffix: it is no decoder, or the tokenizer has no tokens for that.
            Diverged: the logits are not finite.
        """
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stream": stream}
        how["suffixes"] = suffixes
        return [row.text for row in self.rows(params, prompts, max_new_tokens=max_new_tokens, **how)]

    def rows(
        self,
        params: Any,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stream: Stream | None = None,
        suffixes: Sequence[str] | None = None,
    ) -> list[Row]:
        """What `__call__` gives the texts of, with their ids."""
        tokenizer = self.tokenizer
        mode, sampling = settings(tokenizer.vocab_size, temperature, top_k, top_p, seed)
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
        self._check_network()
        if suffixes is not None:
            self._check_suffixes(prompts, suffixes)
        given = itertools.repeat(None) if suffixes is None else suffixes
        rows = [
            Row(tokenizer, prompt, self._start_id, suffix, reading=self.reading(prompt))
            for prompt, suffix in zip(prompts, given, strict=False)
        ]
        for index, row in enumerate(rows):
            if row.whole and self._bounded and len(row.ids) > self._model.config.max_length:
                raise UserError(
                    f"prompt {index}{' and its suffix have' if suffixes else ' has'} {len(row.ids)} tokens, and the model positions for "
                    f"{self._model.config.max_length}; shorten them"
                )
        if not rows or max_new_tokens == 0:
            return rows
        batch = _Batch(
            programs=self._programs_for(params),
            params=params,
            rows=rows,
            eos_id=tokenizer.eos_id,
            limit=max_new_tokens,
            capacity=self._capacity(max(len(row.ids) for row in rows) + max_new_tokens),
            mode=mode,
            sampling=sampling,
            stream=stream,
            source_length=self._source_length(rows),
            both_ways=self._both_ways,
        )
        batch.run()
        return rows

    def reading(self, prompt: str) -> Reading:
        """How a prompt is read."""
        reading = self._objective.reading(is_marked(prompt, self.tokenizer))
        return reading if self._start_id is None else reading._replace(answers=True)

    @property
    def _start_id(self) -> int | None:
        config = self._model.config
        return config.decoder_start_id if config.architecture == "encoder-decoder" else None

    def _check_network(self) -> None:
        config = self._model.config
        if config.architecture == "encoder":
            raise UserError(
                "an encoder does not continue texts; give it one with masks to fill, by maxpretrain.fill.FillMask"
            )
        if "lm" not in config.heads:
            raise UserError(
                f'model.heads are {", ".join(config.heads) or "none"}; without "lm" there is nothing to generate with'
            )
        if config.architecture == "encoder-decoder" and config.decoder_start_id is None:
            raise UserError(
                "model.decoder_start_id is None; set it to the id that the decoder was trained to begin with"
            )

    def _check_suffixes(self, prompts: Sequence[str], suffixes: Sequence[str]) -> None:
        architecture = self._model.config.architecture
        if architecture != "decoder":
            raise UserError(
                f"a suffix is for a decoder that fills in the middle, and this network is an {architecture}; leave it "
                "out"
            )
        if len(suffixes) != len(prompts):
            raise UserError(f"there are {len(prompts)} prompts and {len(suffixes)} suffixes; give one for each")
        if any(self.reading(prompt).answers for prompt in (prompts or [""])):
            raise UserError(
                "a suffix is for a prompt that the network goes on from, and it answers this one; leave it out"
            )
        fim_ids(self.tokenizer)

    def _source_length(self, rows: Sequence[Row]) -> int:
        """Of prompts with padding, for the encoder; 0: there is none."""
        for index, row in enumerate(rows):
            if self._bounded and len(row.source) > self._model.config.max_length:
                raise UserError(
                    f"prompt {index} has {len(row.source)} tokens, and the encoder positions for {self._model.config.max_length}; shorten it"
                )
        return 0 if self._start_id is None else self._capacity(max(len(row.source) for row in rows))

    @property
    def _bounded(self) -> bool:
        """Whether positions end: of tables, and where they were not trained beyond; rotary ones do not."""
        return self._model.config.is_bounded

    def _capacity(self, needed: int) -> int:
        return min(bucket(needed), self._model.config.max_length) if self._bounded else bucket(needed)

    def _programs_for(self, params: Any) -> Programs:
        placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
        place = NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else None
        if place not in self._programs:
            tokenizer = self.tokenizer
            self._programs[place] = Programs(
                self._model, tokenizer.vocab_size, tokenizer.eos_id, place, both_ways=self._both_ways
            )
        return self._programs[place]


def bucket(size: int) -> int:
    """`size` rounded up, so that few lengths are compiled: powers of two from 16, above 1024 its multiples."""
    return -(-size // 1024) * 1024 if size > 1024 else max(16, 1 << (size - 1).bit_length())


def generate_run(
    run_dir: str | PathLike[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    step: int | None = None,
    stream: Stream | None = None,
    suffix: str | Sequence[str] | None = None,
) -> list[str]:
    """Continuations by the model of a run directory; see `LoadedRun.generate`.

    Args:
        step: of the checkpoint; None: the last one.
    """
    from maxpretrain.api import load

    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stream": stream, "suffix": suffix}
    return load(run_dir, step).generate(prompts, max_new_tokens, **how)


def generate(
    run: Any, prompts: Sequence[str], max_new_tokens: int = 50, temperature: float = 0.0, **how: Any
) -> list[str]:
    """Continuations by a run: a directory, or what `maxpretrain.load` returned; see `LoadedRun.generate`."""
    from maxpretrain.api import load

    run = load(run) if isinstance(run, (str, PathLike)) else run
    return run.generate(prompts, max_new_tokens, temperature, **how)
