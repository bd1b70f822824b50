"""The passes over the documents of a run: counting, sampling for a tokenizer, tokenizing into stores.

Each lists the parts of the sources in one order, has them worked on here or by worker processes, and takes the results
in that order: what is written does not depend on the number of workers.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maxpretrain.config import DataConfig
from maxpretrain.data.clean import BadDocument, Tally
from maxpretrain.data.encode import TRAIN, VALIDATION, Encoded, Job, Result, Route, Task
from maxpretrain.data.sources.base import Source
from maxpretrain.data.store import Store, StoreWriter, write_atomically
from maxpretrain.data.tokenizer import Tokenizer
from maxpretrain.data.workers import Workers
from maxpretrain.errors import UserError

SMALL_BYTES = 6 << 20  # less text than this is done before a process has started
_EARLY = 10_000  # documents after which ten times too many bad ones end a preparation at once


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Passes:
    """Passes over training and validation sources.

    Args:
        train: sources whose documents are split between training and validation, unless `validation` has sources.
        validation: sources for validation alone.
        data: split, workers, max_bad.
        whole_documents: never cut a long document (for tokenizers whose ids cannot be joined).
        progress: as in `prepare`.

    Attributes:
        tally: documents met by `write`.
    """

    def __init__(
        self,
        train: Sequence[Source],
        validation: Sequence[Source],
        data: DataConfig,
        *,
        whole_documents: bool = False,
        progress: Callable[[str, int, int], None] = lambda *_: None,
    ):
        self.sources = [*train, *validation]
        self.tally = Tally()
        self._num_train = len(train)
        self._data = data
        self._tail = bool(train) and not validation and data.split == "tail"
        mode = "all" if validation else data.split
        self.routes = [Route(mode, data.validation_fraction)] * len(train) + [Route()] * len(validation)
        self._starts: dict[
            tuple[int, int], list[int]
        ] = {}  # (source, unit) -> characters of the source before each part
        self._progress = progress
        self._shown = 0.0
        for source in self.sources:
            source.whole_documents = whole_documents

    def count(self) -> None:
        """Finds where the tail of each source begins, where that is asked for."""
        if not self._tail:
            return
        totals = [0] * len(self.sources)
        for result in self._run(Job(self.sources, self.routes), "counting"):
            self._starts.setdefault((result.source, result.unit), []).append(totals[result.source])
            totals[result.source] += result.characters
        fraction = self._data.validation_fraction
        self.routes = [Route("tail", fraction, int(total * (1 - fraction))) for total in totals]

    def write(self, folder: Path, tokenizer: Tokenizer) -> dict[str, list[Store]]:
        """Tokenizes everything into `folder`.

        Returns:
            "train" and "validation": stores in the order of the sources; those of a split without documents are left out
            of "validation".
        """
        writers: dict[tuple[int, int], StoreWriter] = {}
        for i in range(len(self.sources)):
            for side in (TRAIN, VALIDATION) if i < self._num_train and self.routes[i].mode != "all" else (TRAIN,):
                # Nothing of where the text lies: equal text makes an equal store.
                meta = {"route": vars(self.routes[i]), "eos_id": tokenizer.eos_id}
                path = folder / self._store_name(i, side)
                writers[i, side] = StoreWriter(
                    path, vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint, meta=meta
                )
        try:
            for result in self._run(Job(self.sources, self.routes, tokenizer, cores()), "tokenizing"):
                self.tally.merge(result.tally)
                self._check_bad(folder, final=False)
                for side, encoded in enumerate(result.sides):
                    if encoded is not None:
                        _append(writers[result.source, side], encoded)
        except BaseException:
            for writer in writers.values():
                writer.abort()
            raise
        closed = {key: writer.close() for key, writer in writers.items()}
        self._check_empty(closed)
        self._check_bad(folder, final=True)
        stores: dict[str, list[Store]] = {"train": [], "validation": []}
        for (i, side), store in closed.items():
            kind = "train" if i < self._num_train and side == TRAIN else "validation"
            if kind == "train" or store.num_tokens:
                stores[kind].append(store)
        return stores

    def _store_name(self, source: int, side: int) -> str:
        if source < self._num_train:
            return f"{'train' if side == TRAIN else 'validation'}-{source}"
        return f"validation-{source - self._num_train}"

    def _check_empty(self, stores: dict[tuple[int, int], Store]) -> None:
        for i, source in enumerate(self.sources):
            if not sum(store.num_documents for (of, _), store in stores.items() if of == i):
                raise self._empty(source.name, self.tally)

    def _empty(self, name: str, tally: Tally) -> UserError:
        why = f" ({tally.reasons()})" if tally.bad else ""
        example = next((f"; first {d.id}: {d.excerpt}" for d in tally.examples if d.excerpt), "")
        return UserError(f'"{name}" holds no usable text{why}{example}; name a source with text in it')

    def _check_bad(self, folder: Path, *, final: bool) -> None:
        tally, limit = self.tally, self._data.max_bad
        seen = tally.good + tally.num_bad
        if not (final and tally.fraction_bad > limit) and not (seen >= _EARLY and tally.num_bad > 10 * limit * seen):
            return
        listed = folder.parent / f"quarantine-{folder.name.removeprefix('.partial-')}.jsonl"
        write_quarantine(listed, tally)
        raise UserError(too_many_bad(tally.good, tally.bad, limit, listed))

    def sample(self, num_bytes: int) -> Iterator[str]:
        """Training texts, about `num_bytes` in all, from parts spread evenly over the sources."""
        total = sum(s.size for s in self.sources[: self._num_train])
        share = min(1.0, num_bytes / max(1, total))
        tally, given = Tally(), 0
        for text in self._texts(self._spread(share), tally):
            yield text
            given += len(text)
            if given >= num_bytes:
                break
        if not given:
            names = '", "'.join(s.name for s in self.sources[: self._num_train])
            if (
                any(route.mode != "all" for route in self.routes)
                and not tally.bad
                and sum(s.size for s in self.sources[: self._num_train])
            ):
                raise UserError(
                    f'no text of "{names}" is left for training: all of it went to validation; give more documents, or keep the '
                    "last part of the text instead: --data.split tail"
                )
            raise self._empty(names, tally)

    def _spread(self, share: float) -> Iterator[Task]:
        """About `share` of the training parts: one is taken whenever less than its share has been."""
        passed = taken = 0.0
        for i, source in enumerate(self.sources[: self._num_train]):
            for u, unit in enumerate(source.units()):
                end = passed + unit.size * share
                if share < 1 and end <= taken:  # not even opened
                    passed = end
                    continue
                for task in self._listed(i, u, unit):
                    passed += task.part.size * share
                    if share >= 1 or passed > taken:
                        taken += task.part.size
                        yield task
                    elif not source.seekable(unit):
                        break  # what follows would have to be unpacked only to be passed over
                passed = end

    def _listed(self, source: int, u: int, unit: Any) -> Iterator[Task]:
        """Tasks for the parts of one unit of a source."""
        starts = self._starts.get((source, u), [])
        for n, part in enumerate(self.sources[source].parts(unit)):
            yield Task(part, source, u, starts[n] if n < len(starts) else 0)

    def _tasks(self) -> Iterator[Task]:
        for i, source in enumerate(self.sources):
            for u, unit in enumerate(source.units()):
                yield from self._listed(i, u, unit)

    def _run(self, job: Job, stage: str) -> Iterator[Result]:
        """Results of all tasks, in order."""
        total, done = sum(s.size for s in self.sources), 0
        workers = self._data.workers or cores()
        slow = job.tokenizer is not None and job.tokenizer.kind in ("sentencepiece", "huggingface")
        if total <= SMALL_BYTES * (1 if slow else 20) or workers == 1:
            results = map(job, self._tasks())
        else:
            job = replace(job, threads=1)
            results = self._by_workers(job, workers)
        for result in results:
            yield result
            done += result.size
            self._show(stage, done, total)
        self._show(stage, total, total, last=True)

    def _by_workers(self, job: Job, count: int) -> Iterator[Result]:
        with Workers(job, count) as workers:
            yield from workers.map(self._tasks())

    def _show(self, stage: str, done: int, total: int, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self._shown >= 0.1:
            self._shown = now
            self._progress(stage, min(done, total), total)

    def everything(self) -> Iterator[str]:
        """All texts, of training and validation."""
        tally = Tally()
        found = False
        for text in self._texts(self._tasks(), tally, (TRAIN, VALIDATION)):
            found = True
            yield text
        if not found:
            raise self._empty('", "'.join(s.name for s in self.sources), tally)

    def _texts(self, tasks: Iterable[Task], tally: Tally, sides: tuple[int, ...] = (TRAIN,)) -> Iterator[str]:
        for task in tasks:
            at = task.at
            for document in self.sources[task.source].documents(task.part):
                if isinstance(document, BadDocument):
                    tally.refuse(document)
                    continue
                for side, piece in self.routes[task.source].sides(document, at):
                    if side in sides and piece.text:
                        yield piece.text
                at += len(document.text)


def _append(writer: StoreWriter, encoded: Encoded) -> None:
    writer.add_many(encoded.ids, encoded.lengths, encoded.num_bytes, continues=encoded.continues)


def write_quarantine(path: Path, tally: Tally) -> None:
    """Lists the documents left out, and the giants: one JSON object a line with id, reason, excerpt, kept."""
    lines = "".join(json.dumps(line) + "\n" for line in tally.lines())
    write_atomically(path, lines.encode())


def too_many_bad(good: int, bad: dict[str, int], limit: float, listed: Path) -> str:
    """The sentence that ends a preparation with too many unusable documents."""
    tally = Tally(good, Counter(bad))
    return (
        f"{tally.num_bad} of {good + tally.num_bad} documents are unusable, more than the {limit:.3%} that data.max_bad allows: {tally.reasons()}; "
        f"they are listed in {listed}; mend the data, or raise data.max_bad to go on without them"
    )
