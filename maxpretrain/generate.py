"""Continuation of texts by a decoder, with a cache of keys and values."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxpretrain.data.tokenizer import Tokenizer
from maxpretrain.errors import Diverged, UserError
from maxpretrain.models import Model

Stream = Callable[[int, str], None]
State = dict[str, Any]

PIECE = 256  # tokens of a prompt that go through the network at one time, at most
CHUNK = 32  # tokens that one dispatch makes, at most
NOTHING, NOT_FINITE = -1, -2  # in place of a token: the row stands still; its logits are no numbers


class Sampling(NamedTuple):
    """How a token is drawn: logits / temperature, then the `top_k` likeliest, then the likeliest of total probability `top_p`.

    Attributes:
        seed: uint32; token number n of row r is drawn with the key (seed, r, n), whatever else is in the batch.
        temperature: float32 above 0.
        top_k: int32 in [1, V].
        top_p: float32 in (0, 1].
    """

    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any


def filtered(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits with −∞ for what is not among the likeliest.

    A token is kept if its rank is below `top_k` and those before it have less than `top_p` of the probability that is left
    after `top_k`; so the likeliest always is. Tokens as likely as the last one kept are kept too.

    Args:
        logits: float32 [B, V], already divided by the temperature.
        top_k: int32 [].
        top_p: float32 [].

    Reference: Holtzman et al. 2020, arXiv:1904.09751, §3.1; the order is that of Hugging Face transformers.
    """
    ranked = -jnp.sort(-logits, axis=-1)
    rank = jax.lax.broadcasted_iota(jnp.int32, ranked.shape, 1)
    ranked = jnp.where(rank < top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = jnp.logical_and(rank < top_k, jnp.logical_or(before < top_p, jnp.logical_or(top_p >= 1.0, rank == 0)))
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def draw(logits: jax.Array, number: jax.Array, sampling: Sampling, mode: str) -> jax.Array:
    """The next token of every row.

    Args:
        logits: float32 [B, V].
        number: int32 [B], how many tokens each row was given before.
        mode: "greedy" (the likeliest), "sample", or "filter" (sample with top_k and top_p).

    Returns:
        int32 [B]; NOT_FINITE for a row whose logits are NaN or infinite.
    """
    peak = jnp.max(logits, axis=-1)
    if mode != "greedy":
        logits = logits / sampling.temperature
        if mode == "filter":
            logits = filtered(logits, sampling.top_k, sampling.top_p)
        key = jax.random.key(sampling.seed, impl="threefry2x32")
        rows = jnp.arange(logits.shape[0])
        keys = jax.vmap(lambda row, n: jax.random.fold_in(jax.random.fold_in(key, row), n))(rows, number)
        logits = logits + jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], jnp.float32))(keys)
    return jnp.where(jnp.isfinite(peak), jnp.argmax(logits, axis=-1).astype(jnp.int32), NOT_FINITE)


class _Programs:
    """What is compiled: an empty state, a piece of prompts, a chunk of tokens.

    The state of B rows: `cache`; `token` [B], the newest; `position` [B], where it will stand; `number` [B], new tokens so
    far; `done` [B], ended by eos. A row whose position is beyond the cache stands still until its prompt is given again.
    """

    def __init__(self, model: Model, vocab_size: int, eos_id: int | None, place: NamedSharding | None):
        self._model, self._vocab_size, self._eos_id = model, vocab_size, eos_id
        # Where parameters are spread over a mesh, everything else is on all of its devices: left to the partitioner, the
        # state would come out placed differently than it went in, and the next call would compile again.
        jit = functools.partial(jax.jit, out_shardings=place)
        self.empty = jit(self._empty, static_argnums=(0, 1))
        self.prefill = jit(self._prefill, static_argnames="mode", donate_argnames="state")
        self.chunk = jit(self._chunk, static_argnames="mode", donate_argnames="state")

    def _empty(self, rows: int, capacity: int) -> State:
        zeros = lambda dtype: jnp.zeros((rows,), dtype)  # noqa: E731
        return {
            "cache": self._model.empty_cache(rows, capacity),
            "token": zeros(jnp.int32),
            "position": zeros(jnp.int32),
            "number": zeros(jnp.int32),
            "done": zeros(jnp.bool_),
        }

    def _next(self, params: Any, hidden: jax.Array, state: State, sampling: Sampling, mode: str) -> jax.Array:
        """[B, D] -> the token after each. Rows of the embedding beyond the tokenizer's ids are never chosen."""
        logits = self._model.logits(params, hidden)[:, : self._vocab_size]
        return draw(logits, state["number"], sampling, mode)

    def _prefill(
        self,
        params: Any,
        state: State,
        tokens: jax.Array,
        start: jax.Array,
        lengths: jax.Array,
        sampling: Sampling,
        mode: str,
    ) -> tuple[State, jax.Array]:
        """Positions start … start + P − 1 of prompts; a prompt that ends among them gets its next token.

        Args:
            tokens: int32 [B, P], padded at the end.
            lengths: int32 [B] of the whole prompts; 0: the row has none and keeps its state.
        """
        size = tokens.shape[1]
        positions = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32)[None], tokens.shape)
        # Padding is written to slots that come later, where no query looks before a real token replaces it.
        hidden, cache = self._model.decode(params, tokens, positions, state["cache"])
        mine = lengths > 0
        keep = lambda new, old: jnp.where(mine.reshape(1, -1, *[1] * (new.ndim - 2)), new, old)  # noqa: E731
        state = state | {"cache": jax.tree.map(keep, cache, state["cache"])}
        ends = jnp.logical_and(lengths > start, lengths <= start + size)
        last = jnp.clip(lengths - 1 - start, 0, size - 1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        token = self._next(params, hidden, state, sampling, mode)
        return self._given(state, token, ends, lengths)

    def _given(self, state: State, token: jax.Array, active: jax.Array, position: jax.Array) -> tuple[State, jax.Array]:
        """The state after active rows were given a token, which will stand at `position`."""
        ended = jnp.zeros_like(active) if self._eos_id is None else token == self._eos_id
        after = {
            "token": jnp.maximum(token, 0),
            "position": position,
            "number": state["number"] + 1,
            "done": jnp.logical_or(ended, token == NOT_FINITE),
        }
        return (
            state | {name: jnp.where(active, new, state[name]) for name, new in after.items()},
            jnp.where(active, token, NOTHING),
        )

    def _chunk(
        self, params: Any, state: State, count: jax.Array, limit: jax.Array, sampling: Sampling, mode: str
    ) -> tuple[State, jax.Array]:
        """`count` more tokens for every row that is not done, has fewer than `limit`, and has room: int32 [B, CHUNK]."""
        capacity = state["cache"]["key"].shape[2]

        def active(state: State) -> jax.Array:
            going = jnp.logical_and(state["number"] < limit, state["position"] < capacity)
            return jnp.logical_and(going, jnp.logical_not(state["done"]))

        def body(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
            i, state, out = carry
            at = state["position"]
            hidden, cache = self._model.decode(params, state["token"][:, None], at[:, None], state["cache"])
            token = self._next(params, hidden[:, 0], state, sampling, mode)
            state, token = self._given(state | {"cache": cache}, token, active(state), at + 1)
            return i + 1, state, out.at[:, i].set(token)

        def going(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
            return jnp.logical_and(carry[0] < count, jnp.any(active(carry[1])))

        out = jnp.full((state["token"].shape[0], CHUNK), NOTHING, jnp.int32)
        _, state, out = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state, out))
        return state, out


class _Text:
    """The text of one row as its ids arrive; half a character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._queue: deque[int] = deque()
        self._stream = tokenizer.stream(self._ids())
        for i in prompt:  # a tokenizer may treat the beginning of a text differently from its middle
            self.push(i)

    def _ids(self) -> Iterator[int]:
        while self._queue:
            yield self._queue.popleft()

    def push(self, id: int) -> str:
        self._queue.append(id)
        return next(self._stream)

    def rest(self) -> str:
        return next(self._stream, "")


@dataclasses.dataclass
class _Row:
    """One prompt and what became of it. The cache holds `ids[start:]`, but for the newest."""

    ids: list[int]
    text: _Text
    start: int = 0
    number: int = 0
    finished: bool = False
    parts: list[str] = dataclasses.field(default_factory=list)


class Generator:
    """Continues texts; keeps what it compiled for the next call.

    Args:
        model: a decoder.
        tokenizer: its ids are below the model's vocabulary.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer):
        vocab_size = model.config.vocab_size
        assert vocab_size is not None
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model's vocabulary only {vocab_size}; use the tokenizer that it was trained with"
            )
        self._model, self._tokenizer = model, tokenizer
        self._programs: dict[NamedSharding | None, _Programs] = {}
        # A table of positions ends; rotary ones do not.
        bounded = model.config.position in ("learned", "sinusoidal")
        self._limit = model.config.max_length if bounded else None

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
    ) -> list[str]:
        """Continuations, without their prompts, each as it would be alone.

        A text that outgrows a bounded window (a table of learned positions) goes on from the last half of it.

        Args:
            params: of the model; on one device or spread over a mesh.
            prompts: texts; an empty one begins with the tokenizer's bos, or eos where it has none.
            max_new_tokens: of each continuation, which ends earlier at eos.
            temperature: 0 takes the likeliest token, and ignores what follows here.
            top_k: draw among the so many likeliest only.
            top_p: draw among the likeliest of total probability p only.
            seed: the same one draws the same texts.
            stream: called with (index of the prompt, piece of text) as text arrives; only whole characters.

        Raises:
            UserError: a setting is out of range, or a prompt is empty and the tokenizer has neither bos nor eos.
            Diverged: the model's logits are not finite.
        """
        mode, sampling = self._sampling(temperature, top_k, top_p, seed)
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 0")
        rows = [self._row(prompt) for prompt in prompts]
        if not rows or max_new_tokens == 0:
            return [""] * len(rows)
        programs = self._programs_for(params)
        longest = max(len(row.ids) for row in rows)
        capacity = _bucket(longest + max_new_tokens)
        piece = min(_bucket(longest), PIECE, capacity)
        if self._limit is not None and longest + max_new_tokens > self._limit:
            capacity = self._limit
            # The size of later prefills too, so that they need not be compiled.
            piece = min(max(piece, _bucket(capacity // 2)), PIECE, capacity)
        state = programs.empty(len(rows), capacity)
        count, limit = (1 if stream else CHUNK), np.int32(max_new_tokens)
        while going := [row for row in rows if not row.finished]:
            full = [row for row in going if not row.number or len(row.ids) - row.start > capacity]
            if full:
                state = self._prefill(
                    programs, params, state, rows, full, piece, capacity, sampling, mode, limit, stream
                )
                continue
            begun = time.perf_counter()
            state, out = programs.chunk(params, state, np.int32(count), limit, sampling, mode=mode)
            self._take(rows, jax.device_get(out), max_new_tokens, stream)
            if stream:  # a few times a second is often enough
                count = min(2 * count, CHUNK) if time.perf_counter() - begun < 0.05 else max(count // 2, 1)
        return ["".join(row.parts) for row in rows]

    def _prefill(
        self,
        programs: _Programs,
        params: Any,
        state: State,
        rows: list[_Row],
        full: list[_Row],
        piece: int,
        capacity: int,
        sampling: Sampling,
        mode: str,
        limit: np.int32,
        stream: Stream | None,
    ) -> State:
        """Puts the contexts of the rows in `full` through the network, and takes their next tokens."""
        lengths = np.zeros(len(rows), np.int32)
        for i, row in enumerate(rows):
            if any(row is other for other in full):
                if len(row.ids) - row.start > capacity:
                    row.start = len(row.ids) - max(capacity // 2, 1)
                lengths[i] = len(row.ids) - row.start
        padded = np.zeros((len(rows), -(-int(lengths.max()) // piece) * piece), np.int32)
        for i, row in enumerate(rows):
            if lengths[i]:
                padded[i, : lengths[i]] = row.ids[row.start :]
        for start in range(0, padded.shape[1], piece):
            tokens = padded[:, start : start + piece]
            state, out = programs.prefill(params, state, tokens, np.int32(start), lengths, sampling, mode=mode)
            self._take(rows, jax.device_get(out)[:, None], int(limit), stream)
        return state

    def _take(self, rows: list[_Row], tokens: np.ndarray, limit: int, stream: Stream | None) -> None:
        """Adds new tokens [B, n] to their rows."""
        for index, (row, new) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            for token in new:
                if token == NOT_FINITE:
                    raise Diverged(
                        f"the model's logits are not finite after {len(row.ids)} tokens of prompt {index}; use an earlier checkpoint"
                    )
                if row.finished or token == NOTHING:
                    continue
                row.number += 1
                row.finished = token == self._tokenizer.eos_id or row.number == limit
                text = ""
                if token != self._tokenizer.eos_id:
                    row.ids.append(token)
                    text = row.text.push(token)
                if row.finished:
                    text += row.text.rest()
                if text:
                    row.parts.append(text)
                    if stream:
                        stream(index, text)

    def _row(self, prompt: str) -> _Row:
        ids = self._tokenizer.encode(prompt).tolist()
        text = _Text(self._tokenizer, ids)
        if not ids:
            first = self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id
            if first is None:
                raise UserError(
                    f"the prompt is empty, and a {self._tokenizer.kind} tokenizer without bos or eos cannot begin from nothing; give at least one character"
                )
            ids = [first]
        return _Row(ids, text)

    def _sampling(self, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> tuple[str, Sampling]:
        for wrong, what in (
            (not 0 <= temperature < float("inf"), f"temperature is {temperature}; it must be at least 0"),
            (top_k is not None and top_k < 1, f"top_k is {top_k}; it must be at least 1, or None for all tokens"),
            (top_p is not None and not 0 < top_p <= 1, f"top_p is {top_p}; it must be above 0 and at most 1"),
        ):
            if wrong:
                raise UserError(what)
        vocab_size = self._tokenizer.vocab_size
        top_k = vocab_size if top_k is None else min(top_k, vocab_size)
        top_p = 1.0 if top_p is None else top_p
        mode = "greedy" if temperature == 0 else "sample" if top_k == vocab_size and top_p == 1 else "filter"
        numbers = np.float32(temperature), np.int32(top_k), np.float32(top_p)
        return mode, Sampling(np.uint32(seed % 2**32), *numbers)

    def _programs_for(self, params: Any) -> _Programs:
        placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
        place = NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else None
        if place not in self._programs:
            tokenizer = self._tokenizer
            self._programs[place] = _Programs(self._model, tokenizer.vocab_size, tokenizer.eos_id, place)
        return self._programs[place]


def _bucket(size: int) -> int:
    """`size` rounded up, so that few lengths are compiled for: powers of two from 16, multiples of 1024 above that."""
    if size > 1024:
        return -(-size // 1024) * 1024
    return max(16, 1 << (size - 1).bit_length())
