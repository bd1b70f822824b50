"""Everything a training loop needs, assembled and checked; nothing is compiled and nothing written to the run directory."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import optax

from maxpretrain import hardware, optim
from maxpretrain.config import Run
from maxpretrain.data.pipeline import EvaluationBatches, Pipeline
from maxpretrain.data.prepare import Prepared
from maxpretrain.data.tokenizer import load_tokenizer
from maxpretrain.errors import UserError
from maxpretrain.evaluate.perplexity import Evaluator
from maxpretrain.mesh import Layout, make_layout
from maxpretrain.models import Model
from maxpretrain.objectives import Objective
from maxpretrain.rundir import RunDirectory
from maxpretrain.train.start import initial_state
from maxpretrain.train.state import State, abstract_state, init_state
from maxpretrain.train.step import make_train_step
from maxpretrain.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run, on its mesh.

    Attributes:
        run: resolved: `model.vocab_size` is a number.
        objective: the run's, knowing its tokens.
        choices: lines that say what was chosen for `auto`.
        origin: the directory that the first parameters come from; None: fresh ones.
    """

    run: Run
    prepared: Prepared
    objective: Objective
    layout: Layout
    model: Model
    optimizer: optax.GradientTransformation
    pipeline: Pipeline
    evaluator: Evaluator
    choices: list[str]
    origin: RunDirectory | None = None

    @property
    def abstract_state(self) -> State:
        return abstract_state(self.model, self.optimizer, self.layout)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        batch = self.run.batch
        return {
            name: jax.ShapeDtypeStruct((batch.size, *shape), dtype, sharding=self.layout.batch_sharding())
            for name, (shape, dtype) in self.objective.fields(batch.length).items()
        }

    def init(self) -> State:
        if self.origin is not None:
            return initial_state(self.model, self.optimizer, self.layout, self.origin, self.run.seed)
        return init_state(self.model, self.optimizer, self.layout, self.run.seed)

    def train_step(self) -> Callable[..., Any]:
        run = self.run
        return make_train_step(
            self.model,
            self.objective,
            self.optimizer,
            run.optimizer,
            _learning_rate(run),
            seed=run.seed,
            microbatches=run.batch.microbatches,
            balance=run.balance,
        )


def _learning_rate(run: Run) -> Callable[[Any], Any]:
    opt = run.optimizer
    return optim.schedule(opt.schedule, peak_lr=opt.peak_lr, steps=run.steps, tokens_per_step=run.tokens_per_step)


def resolve_vocabulary(run: Run, vocab_size: int) -> Run:
    """The run with `model.vocab_size` set; a tokenizer with more ids than the model has rows is refused."""
    rows = run.model.vocab_size
    if rows is None:
        return run.replace(model=dataclasses.replace(run.model, vocab_size=vocab_size))
    if rows < vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} ids, but model.vocab_size is {rows}; use --model.vocab-size {vocab_size} or more, or None"
        )
    return run


def _check_prompts(run: Run, prepared: Prepared) -> None:
    """Refuses at once what the first evaluation, hundreds of steps later, could not continue."""
    tokenizer = prepared.tokenizer
    for prompt in run.evaluation.prompts if run.evaluation.sample_tokens else ():
        try:
            nothing = not len(tokenizer.encode(prompt)) and tokenizer.bos_id is None and tokenizer.eos_id is None
        except UserError as error:
            raise UserError(f"evaluation.prompts: {error}, or give other prompts") from error
        if nothing:
            raise UserError(
                f"evaluation.prompts has an empty text, and a {tokenizer.kind} tokenizer cannot begin with it"
            )


def precheck(run: Run) -> None:
    """Refuses what the devices here cannot run, before text is prepared, which may take hours; `build` checks the rest.

    Raises:
        UserError: as `build`, of all that does not depend on the text or the tokenizer.
    """
    if run.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            'log.wandb needs the package wandb, which is not installed; pip install "maxpretrain[track]", or leave log.wandb off'
        )
    asked, there = run.compute.cpu_devices, jax.devices()
    if asked and there[0].platform == "cpu" and len(there) != asked:
        raise UserError(
            f"compute.cpu_devices is {asked}, but jax has started with {len(there)} CPU devices; leave the count out of XLA_FLAGS, "
            "and in Python call mp.train before anything that uses jax"
        )
    if run.tokenizer.path:
        run.objective.bind(Vocabulary.of(load_tokenizer(run.tokenizer.path, run.tokenizer.kind)))
    layout = make_layout(run.mesh)
    if run.model.vocab_size is None:  # not known yet: any that the mesh divides
        run = run.replace(model=dataclasses.replace(run.model, vocab_size=layout.extent("vocab")))
    hardware.resolve(run, layout.mesh.devices.flat[0], devices=layout.num_devices, batch_parts=layout.extent("batch"))
    layout.check(run.objective.build(run.model).abstract, run.batch.size, run.batch.microbatches)
    _learning_rate(run)


def build(run: Run, prepared: Prepared, origin: RunDirectory | None = None) -> Setup:
    """Assembles a run.

    Raises:
        UserError: a number that the mesh does not divide, a text shorter than a window, a kernel that cannot serve.
    """
    run = resolve_vocabulary(run, prepared.tokenizer.vocab_size)
    layout = make_layout(run.mesh)
    devices, parts = layout.num_devices, layout.extent("batch")
    execution, choices = hardware.resolve(run, layout.mesh.devices.flat[0], devices=devices, batch_parts=parts)
    objective = run.objective.bind(Vocabulary.of(prepared.tokenizer))
    model = objective.build(run.model, execution)
    layout.check(model.abstract, run.batch.size, run.batch.microbatches)
    optimizer = optim.build_optimizer(
        run.optimizer,
        steps=run.steps,
        tokens_per_step=run.tokens_per_step,
        decay_mask=optim.decay_mask(model.abstract),
        scales=optim.update_scales(model.abstract, run.model.mup_ratio),
    )
    _check_prompts(run, prepared)
    pipeline = Pipeline(
        prepared.train,
        run.data.weights,
        objective,
        batch_size=run.batch.size,
        length=run.batch.length,
        seed=run.seed,
        shuffle=run.data.shuffle,
        rows=layout.local_rows(run.batch.size),
    )
    # The whole batch at once need not fit: the same windows, in parts of the size that training takes.
    part = run.batch.size // run.batch.microbatches
    batches = EvaluationBatches(
        prepared.validation,
        objective.measured(),
        batch_size=part,
        length=run.batch.length,
        windows=run.evaluation.windows,
        rows=layout.local_rows(part),
    )
    evaluator = Evaluator(model, objective, layout, batches, part)
    return Setup(run, prepared, objective, layout, model, optimizer, pipeline, evaluator, choices, origin)
