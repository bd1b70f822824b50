"""What a run is worth: loss, perplexity and bits per byte on its validation text or any other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from maxpretrain.errors import UserError

if TYPE_CHECKING:  # pragma: no cover
    from collections.abc import Sequence

    from maxpretrain.api import LoadedRun
    from maxpretrain.data.store import Store
    from maxpretrain.mesh import Layout
    from maxpretrain.rundir import RunDirectory

__all__ = ["evaluate", "evaluate_run"]

Source = str | os.PathLike[str]


def evaluate_run(run_dir: Source, data: Source | None = None, step: int | None = None) -> dict[str, Any]:
    """Measures a checkpoint on the whole of a text, over all devices here.

    Args:
        run_dir: a run directory, or a run's name under runs/.
        data: a file, glob or source, all of it; None: the run's validation text.
        step: of the checkpoint; None: the last one.

    Returns:
        "step", "loss" (nats per predicted token), "perplexity" and "bits_per_byte" (where the objective has such), "accuracy" and
        what else it reports, "tokens" and "bytes" of the text, and "length" of the windows it was cut into.

    Raises:
        UserError: there is no such run or text, or the text holds nothing to predict.
        StorageError: there is no such checkpoint.
    """
    from maxpretrain.rundir import RunDirectory

    directory = RunDirectory.open(run_dir)
    step = directory.step(step)
    stores = _stores(directory, data, step)
    layout = _layout(directory)
    return {"step": step} | _measure(directory, directory.params(step, layout), stores, layout)


def evaluate(run: LoadedRun | Source, data: Source | None = None) -> dict[str, Any]:
    """`evaluate_run`, of a run directory or of what `maxpretrain.load` returned (with its `params` as they are now)."""
    if isinstance(run, (str, os.PathLike)):
        return evaluate_run(run, data)
    import jax

    from maxpretrain.rundir import abstract_params

    stores = _stores(run.directory, data, run.step)
    layout = _layout(run.directory)
    places = jax.tree.map(lambda struct: struct.sharding, abstract_params(run.config, layout))
    return {"step": run.step} | _measure(run.directory, jax.device_put(run.params, places), stores, layout)


def _layout(directory: RunDirectory) -> Layout:
    """The mesh of the run, where it fits the devices here; else all of them by fsdp, so that what fitted there fits here."""
    from maxpretrain.config import MeshConfig
    from maxpretrain.mesh import make_layout

    abstract = directory.model().abstract
    for mesh in (directory.config.mesh, MeshConfig(data=1, fsdp=-1)):
        try:
            layout = make_layout(mesh)
            layout.check(abstract, layout.extent("batch"))
        except UserError:  # not as many devices as there, or a width that they do not divide
            continue
        return layout
    return make_layout(MeshConfig(data=-1))


def _stores(directory: RunDirectory, data: Source | None, step: int) -> Sequence[Store]:
    from maxpretrain.data.prepare import prepare, prepare_source

    config, tokenizer = directory.config, directory.tokenizer
    config.objective.validate(config)
    if tokenizer is None:
        raise UserError(f"{directory.path} has no tokenizer, so no text can be given to it")
    if data is None and "imported" in directory.meta(step):
        raise UserError(f"{directory.path} was not trained here and has no validation text; give one with --data")
    if data is not None:
        return [prepare_source(os.fspath(data), tokenizer, config.data)]
    prepared = prepare(config)
    if prepared.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"the data of {directory.path} changed: the tokenizer made from it now is not the one that the run was trained with; "
            "restore the files, or give the text to evaluate on with --data"
        )
    made = [store.fingerprint for store in (*prepared.train, *prepared.validation)]
    if directory.meta(step).get("data", made) != made:
        raise UserError(
            f"the data of {directory.path} is not what the run was trained with, and its validation text may be another; restore "
            "the files, or give the text to evaluate on with --data"
        )
    return prepared.validation


def _measure(directory: RunDirectory, params: Any, stores: Sequence[Store], layout: Layout) -> dict[str, Any]:
    from maxpretrain.data.pipeline import EvaluationBatches
    from maxpretrain.evaluate.perplexity import Evaluator
    from maxpretrain.vocabulary import Vocabulary

    config = directory.config
    assert directory.tokenizer is not None
    objective = config.objective.bind(Vocabulary.of(directory.tokenizer)).measured()
    parts = layout.extent("batch")
    # What fits in training fits here; rounded up, for every device to have as many rows.
    size = -(-config.batch.size // config.batch.microbatches // parts) * parts
    batches = EvaluationBatches(
        stores,
        objective,
        batch_size=size,
        length=config.batch.length,
        rows=layout.local_rows(size),
        allow_short=True,
    )
    evaluator = Evaluator(directory.model(layout), objective, layout, batches, size)
    means = {name.removeprefix("eval/"): value for name, value in evaluator(params).items()}
    first = ("loss", "perplexity", "bits_per_byte", "accuracy")
    ordered = {name: means[name] for name in (*first, *means) if name in means}
    # The length counts: a token early in its window has little to go by.
    return ordered | {"tokens": batches.num_tokens, "bytes": batches.num_bytes, "length": config.batch.length}
