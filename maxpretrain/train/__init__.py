"""Training: `train(run)` does all that `maxpretrain train` does."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maxpretrain.config import Run, validate
from maxpretrain.configio import checked
from maxpretrain.errors import Diverged, Stopped, UserError


def train(run: Run, *, fresh: bool = False, debug: bool = False) -> Path:
    """Prepares data where needed, trains, evaluates, checkpoints and writes the report.

    A run that was stopped goes on with the next batch; one that is done is left as it is.

    Args:
        run: the whole description.
        fresh: start over, keeping an earlier run of this name under another.
        debug: let libraries log.

    Returns:
        The run directory.

    Raises:
        UserError: the config, the data or the run directory is wrong; nothing was touched.
        StorageError, Diverged, Stopped: as their exit statuses say; what was saved stays.
    """
    from maxpretrain import environment
    from maxpretrain.train import resume

    run = checked(run)
    validate(run)
    environment.prepare_process(run)
    from maxpretrain.train import start

    run_dir = Path(run.root).expanduser() / run.name
    before = None if fresh else resume.previous(run_dir)
    origin, lines = None, []
    if before is not None and run.init_from and before.init_from == run.init_from and _has_checkpoint(run_dir):
        run = start.kept(run, before, run_dir)
    elif run.init_from:
        run, origin, lines = start.resolve(run)
        validate(run, resolved=True)
    changes = [] if before is None else resume.check_same_run(before, run, run_dir)
    if before is not None and before.model.vocab_size is not None and run.model.vocab_size is None:
        import dataclasses

        run = run.replace(model=dataclasses.replace(run.model, vocab_size=before.model.vocab_size))
    with _directory(run_dir, fresh) as began:
        return _session(run, run_dir, origin, said=[*lines, *changes], changes=changes, began=began, debug=debug)


def _has_checkpoint(run_dir: Path) -> bool:
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


class _Began:
    """`yes` is set once the run has written something worth keeping; `check` raises where the directory was taken over."""

    yes = False

    def check(self) -> None:
        """The lock's own, once there is one."""


@contextlib.contextmanager
def _directory(run_dir: Path, fresh: bool) -> Iterator[_Began]:
    """The run directory, locked; removed again where it is new and the run was refused before it began."""
    import jax

    from maxpretrain.runlock import RunLock
    from maxpretrain.train import resume

    began = _Began()
    if jax.process_index() != 0:
        yield began
        return
    aside = None
    if fresh and run_dir.exists():
        with RunLock(run_dir):
            pass  # refused while another trainer is at work in it
        aside = resume.set_aside(run_dir)
        if aside is not None:
            print(f"the earlier run is kept as {aside}")
    new = not run_dir.exists()
    try:
        with RunLock(run_dir) as lock:
            began.check = lock.check
            yield began
    except (UserError, OSError, KeyboardInterrupt):
        if new and not began.yes:
            shutil.rmtree(run_dir, ignore_errors=True)
            if aside is not None:
                aside.rename(run_dir)  # refused: nothing was touched
                print(f"nothing was started, and the earlier run is {run_dir} again")
        raise


def _session(
    run: Run, run_dir: Path, origin: Any, *, said: list[str], changes: list[str], began: _Began, debug: bool
) -> Path:
    import jax

    from maxpretrain.checkpoint import Checkpoints
    from maxpretrain.data.prepare import prepare
    from maxpretrain.monitor.console import Console
    from maxpretrain.monitor.ledger import Ledger
    from maxpretrain.monitor.report import write_report
    from maxpretrain.train import setup as setups

    first = jax.process_index() == 0
    ledger = Ledger()
    log = run_dir / "log.txt" if first else None
    with Console(run.steps, log, log_every=run.log.every) as console:
        for line in said:
            console.say(line)
        with ledger("prepare"):
            setups.precheck(run)
            with console.working("preparing the data") as work:
                prepared = prepare(
                    run,
                    console.say,
                    lambda stage, done, total: work.update(f"{stage} {done / 1e6:.1f} of {total / 1e6:.1f} MB"),
                )
            setup = setups.build(run, prepared, origin)
        checkpoints = Checkpoints(
            run_dir / "checkpoints",
            keep=run.checkpoint.keep,
            keep_best=run.checkpoint.keep_best,
            warn=console.warn,
            debug=debug,
        )
        with checkpoints:
            identity = {
                "tokenizer": prepared.tokenizer.fingerprint,
                "data": [store.fingerprint for store in (*prepared.train, *prepared.validation)],
                "devices": f"{jax.devices()[0].device_kind}, {setup.layout.describe()}, jax {jax.__version__}",
            }
            with ledger("recover"):
                restored = checkpoints.restore_latest(setup.abstract_state, run.checkpoint.resume)
            if restored is not None:
                _check_identity(restored[1], identity, run_dir, changes)
            began.yes = True
            _train(setup, run_dir, restored, checkpoints, console, ledger, identity, began.check)
        if first:
            with ledger("report"):
                report = write_report([run_dir])
            console.say(f"report: {report}")
    return run_dir


def _check_identity(meta: dict[str, Any], now: dict[str, Any], run_dir: Path, changes: list[str]) -> None:
    """The files behind the config may have changed while the config did not, or have moved."""
    from maxpretrain.train import resume

    moved = "".join(f" ({line})" for line in changes if any(f" {place} " in line for place in resume.PLACES))
    for what, name in (("tokenizer", "tokenizer"), ("data", "prepared text")):
        if meta.get(what) != now[what]:
            raise UserError(
                f"the {name} is not the one that {run_dir} was trained with{moved}; restore the files it came from, or give the "
                "run another --name, or --fresh to start over"
            )


def _train(
    setup: Any,
    run_dir: Path,
    restored: Any,
    checkpoints: Any,
    console: Any,
    ledger: Any,
    identity: dict[str, Any],
    check_owner: Callable[[], None],
) -> None:
    import jax

    from maxpretrain.monitor.sinks import Sinks
    from maxpretrain.train.loop import Trainer

    run = setup.run
    first = jax.process_index() == 0
    state, meta, start = restored if restored is not None else (None, {}, 0)
    if first:
        _write_description(run, setup, run_dir)
    with contextlib.ExitStack() as stack:
        sinks = stack.enter_context(Sinks(run_dir, run, warn=console.warn)) if first else None
        if sinks is not None:
            _announce(setup, sinks, console, start)
        if start >= run.steps:
            console.say(
                f"this run is done: step {start} of {run.steps}; raise --steps to go on, or --fresh to start over"
            )
            return
        if start:
            console.say(f"resuming after step {start} with the next batch")
            if meta.get("devices", identity["devices"]) != identity["devices"]:
                console.say(
                    f"saved on {meta['devices']}, now on {identity['devices']}: the same batches and the same randomness, but the "
                    "last digits of a loss may differ"
                )
        trainer = Trainer(
            setup,
            state,
            start=start,
            run_dir=run_dir,
            sinks=sinks,
            checkpoints=checkpoints,
            console=console,
            ledger=ledger,
            seconds_before=meta.get("seconds", 0.0),
            identity=identity,
            check_owner=check_owner,
        )
        del state, restored
        status = "failed"
        try:
            trainer.start_up()
            trainer.fit()
            status = "done"
        except Stopped:
            status = "stopped"
            raise
        except Diverged:
            status = "diverged"
            raise
        finally:
            trainer.finish(status)
            if status != "done" and first:
                stack.close()
                _report_anyway(run_dir)


def _report_anyway(run_dir: Path) -> None:
    """A run that did not finish has a report too; a fault in writing it must not hide why the run ended."""
    from maxpretrain.monitor.report import write_report

    # An impatient second Ctrl-C ends the report, and not the word that the state is saved.
    with contextlib.suppress(Exception, KeyboardInterrupt):
        write_report([run_dir])


def _write_description(run: Run, setup: Any, run_dir: Path) -> None:
    import json

    from maxpretrain import configio, environment
    from maxpretrain.data.store import write_atomically

    # The config first: without it the directory is no run, and a kill in between would make the next start refuse it.
    write_atomically(run_dir / "config.json", configio.to_json(run).encode())
    setup.prepared.tokenizer.save(run_dir / "tokenizer")
    description = json.dumps(environment.describe(), indent=2) + "\n"
    write_atomically(run_dir / "environment.json", description.encode())


def _announce(setup: Any, sinks: Any, console: Any, start: int) -> None:
    run, prepared, layout = setup.run, setup.prepared, setup.layout
    device = layout.mesh.devices.flat[0]
    parameters = setup.model.num_parameters
    tokens = sum(store.num_tokens for store in prepared.train)
    console.say(
        f"{run.name}: {parameters / 1e6:.1f} M parameters, {tokens / 1e6:.2f} M training tokens, "
        f"{run.steps} steps of {run.tokens_per_step} tokens, {layout.num_devices} × {device.device_kind} ({layout.describe()}), "
        f"{setup.model.execution.dtype}"
    )
    if setup.choices:
        console.say("; ".join(setup.choices))
    baselines = prepared.baselines
    if baselines and run.objective.whole_text:
        console.say(
            f"baselines on the validation text: unigram {baselines['unigram_bits_per_byte']:.3f}, "
            f"bigram {baselines['bigram_bits_per_byte']:.3f} bits per byte"
        )
    sinks.event("start", step=start, devices=layout.num_devices, device_kind=device.device_kind, parameters=parameters)
    sinks.event("baselines", **baselines)
