"""From token stores to batches: every batch is a pure function of (seed, step), so there is no position to save or restore.

Global row n = step · batch_size + row. The mixture says that row n is example k of source s; k is window w of epoch e;
a permutation drawn for (seed, s, e) says where in the text that window is. Processes that make different rows of a
batch need not know of each other, and another number of them, or another batch size, leaves the sequence of rows as
it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from maxpretrain.data.order import BLOCK, EXAMPLE, ORDER, PARTNER, PHASE, Mixture, hash_words, permute
from maxpretrain.errors import UserError
from maxpretrain.objectives.base import Objective

if TYPE_CHECKING:  # pragma: no cover
    from maxpretrain.data.store import Store

Batch = dict[str, np.ndarray]


class Rows(NamedTuple):
    """Where rows come from, each int64 [N]."""

    source: np.ndarray  # index of the store
    epoch: np.ndarray  # of that store
    window: np.ndarray  # in [0, windows_per_epoch)
    start: np.ndarray  # its first token


class Pipeline:
    """Training batches.

    Windows of raw = objective.raw_length(length) tokens lie stride = raw − objective.overlap apart. A store of n tokens
    has (n − overlap) // stride of them per epoch, every epoch. In epoch 0 the first one starts at token 0. In later
    epochs, where `shuffle` is on, the whole grid is shifted by a phase drawn from the seed in [−stride/2, stride/2);
    the first or last window, if that pushes it over the edge, stays at the edge. So no window is lost or short, other
    cuts of the text are seen each epoch, and less than one stride of tokens at an end sits out an epoch.

    Args:
        stores: one a source.
        weights: share of each source in the rows, in any unit; empty: by their windows.
        objective: makes the examples. Where it has a method `examples(tokens [N, raw], segments [N, raw])`, that is
            used for a whole batch, and no random generators are made; else `example`, row by row.
        batch_size: rows of a global batch.
        length: of an example, in tokens.
        seed: at least 0.
        shuffle: windows in another order each epoch; else in the order of the text, always the same.
        rows: which rows of each global batch to make; None: all.

    Attributes:
        windows_per_epoch: windows of each store.

    Raises:
        UserError: a store is shorter than one window, weights that do not fit the stores, rows outside the batch.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        weights: Sequence[float],
        objective: Objective,
        *,
        batch_size: int,
        length: int,
        seed: int,
        shuffle: bool,
        rows: range | None = None,
    ):
        self.stores = tuple(stores)
        self.objective = objective
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.rows = _checked_rows(rows, batch_size)
        self._raw = objective.raw_length(length)
        self._stride = self._raw - objective.overlap
        if not self.stores:
            raise UserError("there is no training source; name one in data.train")
        for store in self.stores:
            _require_window(store, self._raw, length, "training")
        self.windows_per_epoch = tuple((s.num_tokens - objective.overlap) // self._stride for s in self.stores)
        if weights and len(weights) != len(self.stores):
            raise UserError(f"data.weights has {len(weights)} numbers for {len(self.stores)} sources; give one each")
        self._mixture = Mixture(tuple(weights) or self.windows_per_epoch, seed)
        # Blocks are remembered because most batches are a small part of one.
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    def batch(self, step: int) -> Batch:
        """The rows of batch `step` that this process makes: [len(rows), …] arrays as in objective.fields(length)."""
        where = self.where(step)
        words = (self.seed, where.source, where.epoch, where.window)
        tokens = np.empty((len(self.rows), self._raw), np.int32)
        segments, partners = np.empty_like(tokens), np.empty_like(tokens) if self.objective.partner else None
        for i, store in enumerate(self.stores):
            mine = slice(None) if len(self.stores) == 1 else np.flatnonzero(where.source == i)
            starts = where.start[mine]
            tokens[mine] = store.gather(starts, self._raw)
            segments[mine] = segments_of(store, starts, self._raw)
            if partners is not None:
                bits = hash_words(PARTNER, *words)[mine]
                partners[mine] = partners_of(store, starts, self._raw, bits)
        objective = self.objective.at(step)
        return _examples(objective, self.length, tokens, segments, (EXAMPLE, *words), partners)

    def where(self, step: int) -> Rows:
        """Where the rows of batch `step` come from."""
        first = step * self.batch_size + self.rows.start
        stop = first + len(self.rows)
        parts = []
        for number in range(first // BLOCK, (stop - 1) // BLOCK + 1):
            inside = slice(max(first - number * BLOCK, 0), stop - number * BLOCK)
            parts.append([field[inside] for field in self._block(number)])
        return Rows(*map(np.concatenate, zip(*parts, strict=True)))

    def iterate(self, start_step: int, prefetch: int) -> Batches:
        """The batches from `start_step` on, without end, with up to `prefetch` made ahead on threads."""
        return Batches(self.batch, start_step, sys.maxsize, prefetch)

    def _make_block(self, number: int) -> Rows:
        source, index = self._mixture.block(number)
        epoch, window, start = np.empty_like(index), np.empty_like(index), np.empty_like(index)
        for i, (store, windows) in enumerate(zip(self.stores, self.windows_per_epoch, strict=True)):
            mine = np.flatnonzero(source == i)
            epoch[mine], nth = np.divmod(index[mine], windows)
            phase = 0
            if self.shuffle:
                nth = permute(nth, windows, hash_words(ORDER, self.seed, i, epoch[mine]))
                drawn = hash_words(PHASE, self.seed, i, epoch[mine]) % np.uint64(self._stride)
                phase = np.where(epoch[mine] == 0, 0, drawn.astype(np.int64) - self._stride // 2)
            window[mine] = nth
            start[mine] = np.clip(phase + nth * self._stride, 0, store.num_tokens - self._raw)
        return Rows(source, epoch, window, start)


class EvaluationBatches:
    """The same validation batches each time, in the order of the text.

    Windows follow one another so that each token but the first is predicted once; the last one of a store is shorter,
    and padded; the last batch is filled up with rows of weight 0. Where `windows` limits them, they are evenly spread
    over the whole text. Neither which they are nor what is made of each depends on the batch size.

    Args:
        stores: one a source.
        objective: makes the examples, as in `Pipeline`.
        batch_size: rows of a global batch.
        length: of an example, in tokens.
        windows: at most so many; 0: the whole text.
        rows: which rows of each global batch to make; None: all.
        allow_short: accept a store that is shorter than one window (but longer than the objective's overlap).

    Attributes:
        num_tokens: tokens covered, over all rows of all batches.
        num_bytes: UTF-8 bytes of the text that they came from. Bits per byte = mean loss in nats · num_tokens
            / (ln 2 · num_bytes), which puts the first tokens of documents, that nothing predicts, at the mean loss.

    Raises:
        UserError: there is no store, or one is too short.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        objective: Objective,
        *,
        batch_size: int,
        length: int,
        windows: int = 0,
        rows: range | None = None,
        allow_short: bool = False,
    ):
        self.stores = tuple(stores)
        self.objective = objective
        self.length = length
        self.rows = _checked_rows(rows, batch_size)
        self._raw = objective.raw_length(length)
        overlap = objective.overlap
        stride = self._raw - overlap
        if not self.stores:
            raise UserError("there is no validation source; name one in data.validation")
        source, start = [], []
        for i, store in enumerate(self.stores):
            _require_window(store, overlap + 1 if allow_short else self._raw, length, "validation")
            starts = np.arange(0, store.num_tokens - overlap, stride)
            source.append(np.full(len(starts), i))
            start.append(starts)
        self._source, self._start = np.concatenate(source), np.concatenate(start)
        there = len(self._start)
        taken = min(windows or there, there)
        self._index = np.arange(taken) * there // taken
        self._length = -(-len(self._index) // batch_size)
        self._batch_size = batch_size
        self.num_tokens, self.num_bytes = self._covered(overlap)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        with Batches(self.batch, 0, len(self), 2) as batches:
            yield from batches

    def batch(self, number: int) -> Batch:
        """Batch `number`: [len(rows), …] arrays as in objective.fields(length)."""
        first = number * self._batch_size + self.rows.start
        index = self._index[first : first + len(self.rows)]
        tokens = np.zeros((len(self.rows), self._raw), np.int32)
        segments = np.zeros_like(tokens)  # 0: padding
        partners = np.zeros_like(tokens) if self.objective.partner else None
        bits = hash_words(PARTNER, 0, 0, index)
        for row, window in enumerate(index.tolist()):
            store, start = self.stores[self._source[window]], int(self._start[window])
            there = min(self._raw, store.num_tokens - start)
            tokens[row, :there] = store.read(start, there)
            segments[row, :there] = store.segments(start, there)
            if partners is not None:
                partners[row] = partners_of(store, np.array([start]), self._raw, bits[row : row + 1])[0]
        return _examples(self.objective, self.length, tokens, segments, (EXAMPLE, 0, 0, index), partners)

    def _covered(self, overlap: int) -> tuple[int, int]:
        tokens, size = 0, 0.0
        for i, store in enumerate(self.stores):
            start = self._start[self._index[self._source[self._index] == i]]
            begin = np.where(start == 0, 0, start + overlap)  # what windows share counts once
            end = np.minimum(start + self._raw, store.num_tokens)
            tokens += int((end - begin).sum())
            if len(start):  # bytes inside a document: in proportion to its tokens
                at = np.interp(np.stack([begin, end]), store.offsets, store.byte_offsets)
                size += float((at[1] - at[0]).sum())
        return tokens, round(size)


class Batches(Iterator[Batch]):
    """make(start), make(start + 1), … up to make(stop − 1), made ahead by Grain from the moment this is constructed.

    An iterator and a context manager. `close` (or leaving the context, or dropping the last reference) ends the thread
    after the batch that it is at.

    Args:
        make: number of a batch to the batch; pure, and safe to call from several threads.
        start, stop: the batches to make.
        prefetch: batches made ahead; 0: each is made when it is asked for.
    """

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int, prefetch: int):
        import grain  # imports jax, which users of this module's other half (plan, the tests of order) need not wait for

        # One thread: the work holds Python's lock, so that more would only take turns.
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        dataset = grain.MapDataset.source(_Numbered(make, start, stop)).to_iter_dataset(options)
        self._iterator = iter(dataset)
        self._iterator.start_prefetch()

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class _Numbered:
    """A random-access source whose items are batches."""

    def __init__(self, make: Callable[[int], Batch], start: int, stop: int):
        self._make, self._start, self._stop = make, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Batch:
        return self._make(self._start + index)


def segments_of(store: Store, starts: np.ndarray, length: int) -> np.ndarray:
    """`store.segments` of many windows at once.

    Args:
        starts: int64 [N].
        length: tokens per window.

    Returns:
        int32 [N, length].
    """
    # The documents that begin inside each window, after its first token.
    low = np.searchsorted(store.offsets, starts, "right")
    counts = np.searchsorted(store.offsets, starts + length, "left") - low
    row = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    segments = np.zeros((len(starts), length), np.int32)
    segments[:, 0] = 1
    segments[row, store.offsets[low[row] + nth] - starts[row]] = 1
    return np.cumsum(segments, axis=1, dtype=np.int32, out=segments)


@functools.lru_cache(maxsize=64)
def _documents(store: Store) -> np.ndarray:
    """int64: the documents of a store that have tokens."""
    return np.flatnonzero(np.diff(store.offsets) > 0)


def partners_of(store: Store, starts: np.ndarray, length: int, bits: np.ndarray) -> np.ndarray:
    """The beginnings of documents drawn by `bits`, other documents than those of windows at `starts`.

    Args:
        starts: int64 [N].
        length: tokens of each; where the document has fewer, zeros follow.
        bits: uint64 [N].

    Returns:
        int32 [N, length].

    Raises:
        UserError: the text is one document.
    """
    real = _documents(store)
    if len(real) < 2:
        raise UserError(
            f"{store.path} holds one document, and the objective pairs texts of different ones; give data of several documents "
            "(data.separator splits a file into them)"
        )
    own = np.searchsorted(real, np.searchsorted(store.offsets, starts, "right") - 1)
    drawn = (bits % np.uint64(len(real) - 1)).astype(np.int64)
    document = real[drawn + (drawn >= own)]
    begin = store.offsets[document]
    size = store.offsets[document + 1] - begin
    out = np.zeros((len(starts), length), np.int32)
    for row, (first, count) in enumerate(zip(begin.tolist(), np.minimum(size, length).tolist(), strict=True)):
        out[row, :count] = store.read(first, count)
    return out


def _examples(
    objective: Objective,
    length: int,
    tokens: np.ndarray,
    segments: np.ndarray,
    words: tuple[int | np.ndarray, ...],
    partners: np.ndarray | None = None,
) -> Batch:
    """The batch of windows [N, raw]; segment 0, at the end of a row, is padding. `words` seed each row's generator."""
    if _has_vectorized(type(objective)):
        return objective.examples(tokens, segments)
    fields = objective.fields(length)
    batch = {name: np.zeros((len(tokens), *shape), dtype) for name, (shape, dtype) in fields.items()}
    keys = np.stack([hash_words(*words, half) for half in (0, 1)], axis=-1)
    for row, there in enumerate((segments > 0).sum(axis=1).tolist()):
        if not there:
            continue
        rng = np.random.Generator(np.random.Philox(key=keys[row]))
        more = {} if partners is None else {"partner": partners[row]}
        example = objective.example(tokens[row, :there], rng, segments[row, :there], **more)
        for name, array in example.items():
            batch[name][(row, *map(slice, array.shape))] = array
    return batch


@functools.cache
def _has_vectorized(kind: type) -> bool:
    """Whether `examples` speaks for the class's `example`: not where a subclass replaced only the latter."""
    for base in kind.__mro__:
        if "examples" in vars(base) or "example" in vars(base):
            return "examples" in vars(base)
    return False


def _checked_rows(rows: range | None, batch_size: int) -> range:
    rows = range(batch_size) if rows is None else rows
    if not (rows.step == 1 and 0 <= rows.start < rows.stop <= batch_size):
        raise UserError(f"rows {rows.start} to {rows.stop} are not in a batch of {batch_size}; use 0 to {batch_size}")
    return rows


def _require_window(store: Store, needed: int, length: int, part: str) -> None:
    if store.num_tokens < needed:
        raise UserError(
            f"the {part} text {store.path} has {store.num_tokens} tokens, but one window of batch.length {length} needs "
            f"{needed}; shorten batch.length to at most {max(length - needed + store.num_tokens, 1)}, or give more text"
        )
