"""What generation compiles: the steps of a network with a cache of keys and values."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from maxpretrain.models import Model
from maxpretrain.sampling import NOT_FINITE, Sampling, draw

State = dict[str, Any]

CHUNK = 32  # tokens a row that one dispatch makes, at most
NOTHING = -1  # in place of a token: none was made


class Programs:
    """What is compiled: an empty state, a chunk of tokens one by one, a piece of long prompts at once.

    The state of B rows: `cache`; `token` [B], the newest; `position` [B], where it will stand; `number` [B], new tokens so
    far; `done` [B], ended. A row whose position lies beyond the cache stands still until it is restarted. Of an
    encoder-decoder also `memory_segments` [B, S], and in the cache what the decoder looks at in each prompt.
    """

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        eos_id: int | None,
        place: NamedSharding | None,
        *,
        both_ways: bool = False,
    ):
        self._model, self._vocab_size, self._eos_id = model, vocab_size, eos_id
        self._both_ways = both_ways  # a prompt's tokens see each other, so that it has to come in one piece
        # Where parameters are spread over a mesh, everything else is on all of its devices: left to the partitioner, the
        # state would come out placed differently than it went in, and the next call would compile again.
        jit = functools.partial(jax.jit, out_shardings=place)
        self.empty = jit(self._empty, static_argnums=(0, 1))
        self.encode = jit(self._encode, donate_argnames="state")
        self.chunk = jit(self._chunk, static_argnames="mode", donate_argnames="state")
        self.prefill = jit(self._prefill, static_argnames="mode", donate_argnames="state")

    def _empty(self, rows: int, capacity: int) -> State:
        numbers = {name: jnp.zeros((rows,), jnp.int32) for name in ("token", "position", "number")}
        cache = self._model.empty_cache(rows, capacity)
        return numbers | {"cache": cache, "done": jnp.zeros((rows,), jnp.bool_)}

    def _encode(self, params: Any, state: State, tokens: jax.Array, segments: jax.Array) -> State:
        """The state with what an encoder-decoder's decoder is to know of prompts int32 [B, S], 0 in `segments` where padded."""
        memory = self._model.remember(params, self._model.encode(params, tokens, segments))
        return state | {"cache": state["cache"] | memory, "memory_segments": segments}

    def _decode(
        self, params: Any, state: State, tokens: jax.Array, positions: jax.Array, **more: jax.Array
    ) -> tuple[jax.Array, Any]:
        cache = state["cache"]
        hidden, new = self._model.decode(params, tokens, positions, cache, state.get("memory_segments"), **more)
        # What is known of the prompt stays where it is: out of the loop over layers it would come as a copy.
        return hidden, new | {name: kept for name, kept in cache.items() if name.startswith("memory_")}

    def _next(self, params: Any, hidden: jax.Array, state: State, sampling: Sampling, mode: str) -> jax.Array:
        """[B, D] -> the token after each; never one beyond the tokenizer's ids, which a padded embedding has too."""
        logits = self._model.logits(params, hidden)[:, : self._vocab_size]
        return draw(logits, state["number"], sampling, mode)

    def _given(self, state: State, token: jax.Array, position: jax.Array, rows: jax.Array) -> State:
        """The state after `rows` were given a new token, which will stand at `position`."""
        ended = token == NOT_FINITE
        if self._eos_id is not None:
            ended = jnp.logical_or(ended, token == self._eos_id)
        new = {"token": jnp.maximum(token, 0), "position": position, "number": state["number"] + 1, "done": ended}
        return state | {name: jnp.where(rows, value, state[name]) for name, value in new.items()}

    def _chunk(
        self,
        params: Any,
        state: State,
        given: jax.Array,
        count: jax.Array,
        limit: jax.Array,
        sampling: Sampling,
        mode: str,
    ) -> tuple[State, jax.Array]:
        """`count` steps of one token for every row that has not ended, has made fewer than `limit`, and has room.

        Args:
            given: int32 [B, CHUNK + 1], tokens of rows that start (again) here, then NOTHING: a short prompt goes
                through the same loop as what it makes, so that nothing else need be compiled for it.
            count: int32 [], at most CHUNK.

        Returns:
            The state, and int32 [B, CHUNK] new tokens, NOTHING where none was made.
        """
        capacity = state["cache"]["key"].shape[2]
        restart = given[:, 0] != NOTHING
        state = state | {
            "token": jnp.where(restart, given[:, 0], state["token"]),
            "position": jnp.where(restart, 0, state["position"]),
        }

        def active(state: State) -> jax.Array:
            going = jnp.logical_and(state["number"] < limit, state["position"] < capacity)
            return jnp.logical_and(going, jnp.logical_not(state["done"]))

        def going(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
            return jnp.logical_and(carry[0] < count, jnp.any(active(carry[1])))

        def body(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
            i, state, out = carry
            at, moves = state["position"], active(state)
            hidden, cache = self._decode(params, state, state["token"][:, None], at[:, None])
            token = self._next(params, hidden[:, 0], state, sampling, mode)
            known = given[:, i + 1]
            forced = known != NOTHING
            new = jnp.logical_and(moves, jnp.logical_not(forced))
            state = self._given(state | {"cache": cache}, token, at + 1, new)
            state["token"] = jnp.where(forced, known, state["token"])
            state["position"] = jnp.where(forced, at + 1, state["position"])
            return i + 1, state, out.at[:, i].set(jnp.where(new, token, NOTHING))

        out = jnp.full((given.shape[0], CHUNK), NOTHING, jnp.int32)
        _, state, out = jax.lax.while_loop(going, body, (jnp.zeros((), jnp.int32), state, out))
        return state, out

    def _prefill(
        self,
        params: Any,
        state: State,
        tokens: jax.Array,
        start: jax.Array,
        lengths: jax.Array,
        prefixes: jax.Array,
        sampling: Sampling,
        mode: str,
    ) -> tuple[State, jax.Array]:
        """Positions start … start + P − 1 of long prompts; a prompt that ends among them gets its next token.

        Args:
            tokens: int32 [B, P], padded at the end.
            lengths: int32 [B] of the whole prompts; 0: the row has none and keeps its state.
            prefixes: int32 [B], how many of their tokens see each other, where any do.

        Returns:
            The state, and int32 [B, 1] new tokens, NOTHING where none was made.
        """
        size = tokens.shape[1]
        positions = jnp.broadcast_to(start + jnp.arange(size, dtype=jnp.int32)[None], tokens.shape)
        # Padding is written to slots that come later, where no query looks before a real token replaces it.
        more = {"prefix": positions < prefixes[:, None]} if self._both_ways else {}
        hidden, cache = self._decode(params, state, tokens, positions, **more)
        mine = (lengths > 0)[None, :, None, None, None]
        state = state | {"cache": jax.tree.map(lambda new, old: jnp.where(mine, new, old), cache, state["cache"])}
        ends = jnp.logical_and(lengths > start, lengths <= start + size)
        last = jnp.clip(lengths - 1 - start, 0, size - 1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        token = self._next(params, hidden, state, sampling, mode)
        return self._given(state, token, lengths, ends), jnp.where(ends, token, NOTHING)[:, None]
