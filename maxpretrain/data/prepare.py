"""From documents to token stores, once: the cache, its lock, the passes over the text.

    cache/data-<fingerprint>/
        tokenizer/  train-0/ …  validation-0/ …   quarantine.jsonl   complete.json

The folder is made under another name and renamed when everything in it is done, so that a killed preparation leaves
nothing that could be taken for a finished one. Its name is a fingerprint of all that its content depends on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from maxpretrain.config import DataConfig, Run, TokenizerConfig
from maxpretrain.data import store as store_module
from maxpretrain.data.baselines import baselines
from maxpretrain.data.clean import CLEANING_VERSION, Tally
from maxpretrain.data.passes import Passes, too_many_bad, write_quarantine
from maxpretrain.data.sources import Source, open_source
from maxpretrain.data.store import Store, canonical, storage_errors, write_atomically
from maxpretrain.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from maxpretrain.errors import UserError

VERSION = 1  # of all that is made here; raise it when the same sources give other tokens
COMPLETE = "complete.json"
Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What a run learns from.

    Attributes:
        tokenizer: made or loaded.
        train: one store per source in `data.train`.
        validation: one per source of `data.validation`, or one per training source with documents split off.
        baselines: unigram_bits_per_byte and bigram_bits_per_byte of the validation text.
        path: the cache folder that holds all this.
        fingerprint: sha256 hex of all it depends on.
        bad: reason -> documents that were left out; they are listed in path / "quarantine.jsonl".
    """

    tokenizer: Tokenizer
    train: tuple[Store, ...]
    validation: tuple[Store, ...]
    baselines: dict[str, float]
    path: Path
    fingerprint: str
    bad: dict[str, int] = field(default_factory=dict)


def cache_directory(data: DataConfig) -> Path:
    """Where prepared data is kept: $MAXPRETRAIN_CACHE, else `data.cache`."""
    return Path(os.environ.get("MAXPRETRAIN_CACHE") or data.cache).expanduser().absolute()


def prepare(run: Run, report: Report | None = None, progress: Progress | None = None) -> Prepared:
    """Tokenizes the documents of a run, or finds that done already.

    Args:
        run: its `data`, `tokenizer` and `model.vocab_size` count.
        report: called with a sentence at each stage that takes time.
        progress: called with (stage, bytes done, bytes in all), ten times a second at most.

    Raises:
        UserError: sources, tokenizer or split are not usable; nothing is left behind in the cache.
        StorageError: the disk is full.
    """
    data = run.data
    of_train, of_validation = (
        [(s, s.fingerprint()) for s in (open_source(spec, data) for spec in specs)]
        for specs in (data.train, data.validation)
    )
    train, validation = [s for s, _ in of_train], [s for s, _ in of_validation]
    loaded = load_tokenizer(run.tokenizer.path, run.tokenizer.kind) if run.tokenizer.path else None
    wanted = with_symbols(run)
    key = {
        "version": [VERSION, store_module.VERSION, CLEANING_VERSION],
        "train": [fingerprint for _, fingerprint in of_train],
        "validation": [fingerprint for _, fingerprint in of_validation],
        "split": None if validation else [data.split, data.validation_fraction],
        "tokenizer": loaded.fingerprint if loaded else _tokenizer_key(wanted),
    }

    def build(folder: Path) -> dict[str, Any]:
        whole = loaded is not None and not loaded.joins
        passes = Passes(train, validation, data, whole_documents=whole, progress=progress or _no_progress)
        passes.count()
        tokenizer = loaded or _trained(passes, wanted, report or _silent)
        _check_vocabulary(run, tokenizer)
        tokenizer.save(folder / "tokenizer")
        stores = passes.write(folder, tokenizer)
        _check_split(run, stores, passes.tally)
        values = baselines(stores["train"], stores["validation"], tokenizer.vocab_size)
        names = {side: [s.path.name for s in stores[side]] for side in stores}
        return {**names, "baselines": values, **_noted(folder, passes.tally)}

    path, complete = _cached("data", key, data, [*of_train, *of_validation], build, report or _silent)
    tokenizer = loaded or load_tokenizer(path / "tokenizer")
    _check_vocabulary(run, tokenizer)
    sides = {
        side: tuple(
            Store.open(path / name, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)
            for name in complete[side]
        )
        for side in ("train", "validation")
    }
    return Prepared(
        tokenizer,
        sides["train"],
        sides["validation"],
        complete["baselines"],
        path,
        complete["fingerprint"],
        complete["bad"],
    )


def prepare_source(
    spec: str,
    tokenizer: Tokenizer,
    data: DataConfig,
    cache: Path | str | None = None,
    report: Report | None = None,
    progress: Progress | None = None,
) -> Store:
    """One source, whole, tokenized with a given tokenizer; cached like everything else.

    Args:
        spec: as in `data.train`.
        tokenizer: whose ids are wanted.
        data: how records are read (text_field, separator, tfds_split), max_bad, workers and cache.
        cache: another cache folder.

    Raises:
        UserError: nothing is there, it holds no text, or too much of it is unusable.
    """
    source = open_source(spec, data)
    fingerprint = source.fingerprint()
    key = {
        "version": [VERSION, store_module.VERSION, CLEANING_VERSION],
        "source": fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }

    def build(folder: Path) -> dict[str, Any]:
        passes = Passes([], [source], data, whole_documents=not tokenizer.joins, progress=progress or _no_progress)
        stores = passes.write(folder, tokenizer)
        return {"store": stores["validation"][0].path.name, **_noted(folder, passes.tally)}

    path, complete = _cached("source", key, data, [(source, fingerprint)], build, report or _silent, cache)
    return Store.open(
        path / complete["store"], tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size
    )


def texts(spec: str, data: DataConfig) -> Iterator[str]:
    """The texts of the usable documents of a source, in order; long ones in parts."""
    source = open_source(spec, data)
    return Passes([], [source], data).everything()


def _silent(_: str) -> None:
    return None


def _no_progress(*_: Any) -> None:
    return None


def with_symbols(run: Run) -> TokenizerConfig:
    """How the run's tokenizer is trained: with the control symbols that its objective has use for."""
    given = (*run.tokenizer.user_symbols, *run.tokenizer.control_symbols)
    more = tuple(name for name in run.objective.symbols() if name not in given)
    return replace(run.tokenizer, control_symbols=(*run.tokenizer.control_symbols, *more))


def _tokenizer_key(config: TokenizerConfig) -> dict[str, Any]:
    """The fields that decide what a tokenizer to be made will be."""
    used = ["kind", "user_symbols", *(["control_symbols"] if config.control_symbols else [])] + (
        ["vocab_size", "algorithm", "sample_bytes"] if config.kind == "sentencepiece" else []
    )
    return {name: value for name, value in asdict(config).items() if name in used}


def _trained(passes: Passes, config: TokenizerConfig, report: Report) -> Tokenizer:
    if config.kind == "sentencepiece":
        report(f"training a {config.algorithm} tokenizer of {config.vocab_size} pieces")
    # Characters of the validation text need ids too; pieces are learnt from the training text alone.
    texts = passes.everything() if config.kind == "characters" else passes.sample(config.sample_bytes)
    return train_tokenizer(config, texts)


def _check_vocabulary(run: Run, tokenizer: Tokenizer) -> None:
    rows = run.model.vocab_size
    if rows is not None and rows < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size {rows} is smaller than the tokenizer's {tokenizer.vocab_size}; set it to at least that, or to None"
        )


def _check_split(run: Run, stores: dict[str, list[Store]], tally: Tally) -> None:
    for spec, store in zip(run.data.train, stores["train"], strict=True):
        if not store.num_tokens:
            raise UserError(
                f'no text of "{spec}" is left for training: all of it went to validation; lower data.validation_fraction, or use data.split "tail"'
            )
    if not sum(s.num_tokens for s in stores["validation"]):
        raise UserError(
            f"the validation split is empty: data.validation_fraction {run.data.validation_fraction} of {tally.good} documents is none; "
            f'use data.split "tail", a larger fraction, or name data.validation sources'
        )


def _noted(folder: Path, tally: Tally) -> dict[str, Any]:
    """Writes the list of documents left out, and returns the counts."""
    if tally.lines():
        write_quarantine(folder / "quarantine.jsonl", tally)
    return {"good": tally.good, "bad": dict(tally.bad), "fraction_bad": tally.fraction_bad}


def _cached(
    kind: str,
    key: dict[str, Any],
    data: DataConfig,
    sources: Sequence[tuple[Source, str]],
    build: Callable[[Path], dict[str, Any]],
    report: Report,
    cache: Path | str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The folder that `build` filled for `key`, now or before, and what its complete.json says."""
    fingerprint = hashlib.sha256(canonical(key)).hexdigest()
    root = Path(cache).expanduser().absolute() if cache else cache_directory(data)
    path = root / f"{kind}-{fingerprint[:20]}"
    complete = _read_complete(path, fingerprint)
    if complete is None:
        with storage_errors(f"preparing data in {root}"):
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f".lock-{path.name}", report):
                complete = _read_complete(path, fingerprint)  # by whoever held the lock
                if complete is None:
                    _remove_abandoned(root, path.name)
                    complete = _make(path, fingerprint, key, sources, build)
    if complete["fraction_bad"] > data.max_bad:
        raise UserError(too_many_bad(complete["good"], complete["bad"], data.max_bad, path / "quarantine.jsonl"))
    return path, complete


def _read_complete(path: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        complete = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None  # making the folder will say what is in the way
    except PermissionError as error:
        raise UserError(
            f"no permission to read {error.filename}; change its permissions, or set MAXPRETRAIN_CACHE to another folder"
        ) from None
    except ValueError:
        complete = {}
    if complete.get("fingerprint") != fingerprint:
        raise UserError(
            f"the prepared data in {path} is damaged: {COMPLETE} is not what was written; delete that folder and run again"
        )
    return complete


def _make(
    path: Path,
    fingerprint: str,
    key: dict[str, Any],
    sources: Sequence[tuple[Source, str]],
    build: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    partial = path.with_name(f".partial-{path.name}")
    for old in (partial, path):  # of a killed preparation; a folder without complete.json is none
        shutil.rmtree(old, ignore_errors=True)
    try:
        partial.mkdir()
        started = time.time()
        complete = {
            "fingerprint": fingerprint,
            "key": key,
            **build(partial),
            "seconds": round(time.time() - started, 3),
        }
        for source, old in sources:
            if source.fingerprint() != old:
                raise UserError(
                    f'"{source.name}" changed while it was being prepared; run again when nothing writes to it'
                )
        write_atomically(partial / COMPLETE, json.dumps(complete, indent=1).encode())
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return complete


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    """An exclusive lock that ends with the process, however that ends."""
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is preparing the same data; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_abandoned(root: Path, own: str) -> None:
    """Removes what killed preparations of other data left: nobody holds their locks."""
    for partial in root.glob(".partial-*"):
        name = partial.name.removeprefix(".partial-")
        if name == own:
            continue
        with open(root / f".lock-{name}", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(partial, ignore_errors=True)
