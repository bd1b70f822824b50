"""What each verb of the `maxpretrain` command takes and does.

A verb imports what it needs when it runs, and nothing of weight before: `--help` has to answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maxpretrain.errors import DoesNotFit, UserError
from maxpretrain.rundir import find_run


@dataclasses.dataclass(frozen=True)
class Verb:
    """A command.

    Attributes:
        summary: one line of `maxpretrain --help`.
        options: adds its own flags to a parser.
        run: parsed flags -> exit status.
        overrides: whether it takes a CONFIG with --field value.
    """

    summary: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    overrides: bool = False


def _takes_config(parser: argparse.ArgumentParser, after: str = "[--field value ...]") -> None:
    parser.usage = f"{parser.prog} CONFIG [options] {after}"
    parser.add_argument("config", metavar="CONFIG", help="a Python config file, or the bare name of one in configs/")


def _takes_run(parser: argparse.ArgumentParser, **kwargs: Any) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, or a run's name under runs/", **kwargs)


def _takes_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], Any]:
    """A number in [low, high], or (low, high], for argparse."""

    def read(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and not (open_low and value == low):
                return value
        what = "an integer" if kind is int else "a number"
        bounds = f"{'above' if open_low else 'of at least'} {low:g}" + (
            f" and at most {high:g}" if high < float("inf") else ""
        )
        raise argparse.ArgumentTypeError(f'"{text}" is not {what} {bounds}')

    return read


def _train_options(parser: argparse.ArgumentParser) -> None:
    _takes_config(parser)
    parser.add_argument("--fresh", action="store_true", help="start over; the old run is kept aside")


def _train(options: argparse.Namespace) -> int:
    from maxpretrain import configio, environment

    run = configio.resolve(options.config, options.overrides)
    environment.prepare_process(run)
    from maxpretrain.train import train

    try:
        train(run, fresh=options.fresh, debug=options.debug)
    except Exception as error:
        log = Path(run.root, run.name, "log.txt").expanduser()
        if not isinstance(error, (UserError, OSError)) and log.parent.is_dir():
            # After hours of training "run again with --debug" is no comfort.
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
                error.add_note(f"the traceback is in {log}")
        raise
    return 0


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _takes_config(parser)
    parser.add_argument(
        "--target", help="accelerator and size to plan for, such as v5p-128; the devices here by default"
    )
    parser.add_argument("--devices", type=_number(int, 1), help="number of devices to plan for")
    parser.add_argument(
        "--mfu", type=_number(float, 0, 1, open_low=True), help="share of peak FLOP/s to assume, in (0, 1]"
    )
    parser.add_argument(
        "--coordinate-check",
        action="store_true",
        help="instead, train small networks of several widths and see whether activations grow with it, with muP and without",
    )
    parser.add_argument(
        "--widths", type=_widths, default=(), metavar="W,W,...", help="values of model_dim for the coordinate check"
    )
    parser.add_argument("--plot", metavar="FILE", help="where to draw the coordinate check: .png, .svg or .pdf")
    _takes_json(parser)


def _plan(options: argparse.Namespace) -> int:
    from maxpretrain import configio, environment

    run = configio.resolve(options.config, options.overrides)
    if options.coordinate_check:
        return _coordinate_check(run, options)
    if options.widths or options.plot:
        raise UserError("plan: --widths and --plot belong to --coordinate-check; add it")
    environment.prepare_process(run)  # as for training: the plan is for the devices that it would have
    from maxpretrain import plan as planning

    result = planning.plan(run, target=options.target, mfu=options.mfu, devices=options.devices)
    print(_json(result) if options.json else planning.render(result))
    return 0 if getattr(result, "fits", True) is not False else DoesNotFit.exit_status


def _widths(text: str) -> tuple[int, ...]:
    read = _number(int, 1)
    return tuple(read(part) for part in text.split(","))


def _coordinate_check(run: Any, options: argparse.Namespace) -> int:
    from maxpretrain import environment

    environment.prepare_process()
    from maxpretrain.plan import coordinates

    plot = None if options.plot is None else Path(options.plot).expanduser()
    if plot is not None and (plot.suffix not in (".png", ".svg", ".pdf") or not plot.parent.is_dir()):
        raise UserError(f"--plot {plot} must be a .png, .svg or .pdf file in a folder that exists")
    check = coordinates.coordinate_check(run, options.widths)
    print(_json(check.to_dict()) if options.json else coordinates.render(check))
    if plot is not None:
        coordinates.plot(check, plot)
    return 0


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    _takes_config(parser)
    _takes_json(parser)


def _prepare(options: argparse.Namespace) -> int:
    from maxpretrain import configio, environment

    run = configio.resolve(options.config, options.overrides)
    environment.prepare_process()
    from maxpretrain.data.prepare import prepare
    from maxpretrain.train import start

    prepared = prepare(start.resolve(run)[0])
    result: dict[str, Any] = {"vocab_size": prepared.tokenizer.vocab_size}
    for part in ("train", "validation"):
        stores = getattr(prepared, part)
        for unit in ("tokens", "documents", "bytes"):
            result[f"{part}_{unit}"] = sum(getattr(store, f"num_{unit}") for store in stores)
        result[f"{part}_stores"] = [str(store.path) for store in stores]
    _show(result | prepared.baselines, options.json)
    return 0


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _takes_run(parser)
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="text to evaluate on: a file, glob or source; the run's validation text by default",
    )
    parser.add_argument("--step", type=_number(int, 0), metavar="N", help="checkpoint to evaluate; the last by default")
    _takes_json(parser)


def _evaluate(options: argparse.Namespace) -> int:
    from maxpretrain import environment

    directory = find_run(options.run)
    environment.prepare_process()
    from maxpretrain.evaluate import evaluate_run

    _show(evaluate_run(directory, data=options.data, step=options.step), options.json)
    return 0


def _generate_options(parser: argparse.ArgumentParser) -> None:
    _takes_run(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="text to continue, to answer (encoder-decoder), or with masks to fill (encoder); may be given several times",
    )
    parser.add_argument(
        "--suffix",
        action="append",
        metavar="TEXT",
        help="text after what is to be made, for a decoder that fills in the middle; one for all prompts, or for each",
    )
    parser.add_argument(
        "--max-new-tokens", type=_number(int, 1), default=100, metavar="N", help="longest continuation (default: 100)"
    )
    parser.add_argument(
        "--temperature",
        type=_number(float, 0),
        metavar="T",
        help="0 takes the likeliest token (default: 0.8, and 0 for filling masks)",
    )
    parser.add_argument("--top-k", type=_number(int, 1), metavar="K", help="sample among the K likeliest tokens only")
    parser.add_argument(
        "--top-p",
        type=_number(float, 0, 1, open_low=True),
        metavar="P",
        help="sample among the likeliest tokens of total probability P only",
    )
    parser.add_argument(
        "--seed", type=_number(int, 0), default=0, metavar="N", help="the same seed gives the same text (default: 0)"
    )
    parser.add_argument("--step", type=_number(int, 0), metavar="N", help="checkpoint to use; the last by default")
    _takes_json(parser)


def _generate(options: argparse.Namespace) -> int:
    from maxpretrain import environment

    directory = find_run(options.run)
    environment.prepare_process()
    from maxpretrain.api import load

    run = load(directory, options.step)
    architecture = run.config.model.architecture
    temperature = 0.0 if architecture == "encoder" else 0.8
    how = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": temperature if options.temperature is None else options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    suffixes = [""] * len(options.prompt)
    if options.suffix is not None:
        run.generate([], suffix="")  # says what is missing before there is a prompt on the screen
        suffixes = options.suffix * (len(options.prompt) if len(options.suffix) == 1 else 1)
        if len(suffixes) != len(options.prompt):
            raise UserError(
                f"generate: {len(suffixes)} --suffix for {len(options.prompt)} --prompt; give one for all, or one for "
                "each"
            )
        how["suffix"] = suffixes
    if architecture == "encoder":
        _show_filled(options.prompt, run.generate(options.prompt, **how), run.fill(options.prompt), options.json)
        return 0
    # A continuation comes after its prompt.
    shown = ["" if run.answers(prompt) else prompt for prompt in options.prompt]
    streams = len(options.prompt) == 1 and not options.json
    if streams:
        print(shown[0], end="", flush=True)
        how["stream"] = lambda _, piece: print(piece, end="", flush=True)
    texts = run.generate(options.prompt, **how)
    if options.json:
        made = [{"prompt": prompt, "text": text} for prompt, text in zip(options.prompt, texts, strict=True)]
        if options.suffix is not None:
            made = [one | {"suffix": suffix} for one, suffix in zip(made, suffixes, strict=True)]
        print(_json(made))
    elif streams:
        print(suffixes[0])
    else:
        print("\n\n".join(map("".join, zip(shown, texts, suffixes, strict=True))))
    return 0


def _show_filled(prompts: list[str], texts: list[str], candidates: list[Any], as_json: bool) -> None:
    """Texts with their masks filled, and what else would do in each."""
    if as_json:
        masks = [[[one._asdict() for one in mask] for mask in text] for text in candidates]
        rows = zip(prompts, texts, masks, strict=True)
        print(_json([{"prompt": prompt, "text": text, "masks": found} for prompt, text, found in rows]))
        return
    for text, masks in zip(texts, candidates, strict=True):
        print(text)
        for number, mask in enumerate(masks, 1):
            print(f"  mask {number}: " + ", ".join(f'"{_in_a_line(one.text)}" {one.probability:.1%}' for one in mask))


def _in_a_line(text: str) -> str:
    return text.replace("\n", "⏎")


def _export_options(parser: argparse.ArgumentParser) -> None:
    _takes_run(parser)
    parser.add_argument("directory", metavar="DIR", help="directory to make")
    parser.add_argument("--format", choices=["hf"], default="hf", help="hf: safetensors, config.json, tokenizer files")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the tensors in the file (default: float32)",
    )
    parser.add_argument("--step", type=_number(int, 0), metavar="N", help="checkpoint to export; the last by default")
    _takes_json(parser)


def _export(options: argparse.Namespace) -> int:
    from maxpretrain import environment
    from maxpretrain.rundir import RunDirectory

    environment.prepare_process()
    from maxpretrain.convert.exporting import export

    result = export(
        RunDirectory.open(options.run), Path(options.directory).expanduser(), step=options.step, dtype=options.dtype
    )
    _show_comparisons(result, options.json)
    return 0


def _show_comparisons(result: dict[str, Any], as_json: bool) -> None:
    """An export's result, with a line for each reading of the files."""
    if as_json:
        print(_json(result))
        return
    _show({name: value for name, value in result.items() if not isinstance(value, dict) and value != []}, False)
    for reader, found in result.items():
        if isinstance(found, dict):
            print(
                f"read back by {reader}: max |Δlogit| {found['max_difference']:.2e}, KL {found['kl']:.2e} nats, "
                f"greedy agreement {found['agreement']:.2%}"
            )


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="a Hugging Face directory: config.json and safetensors")
    parser.add_argument("run", metavar="RUN", help="the run to make: a name under runs/, or a path")
    _takes_json(parser)


def _import(options: argparse.Namespace) -> int:
    from maxpretrain import environment

    environment.prepare_process()
    from maxpretrain.convert.importing import import_directory

    _show(import_directory(Path(options.directory).expanduser(), options.run), options.json)
    return 0


def _report_options(parser: argparse.ArgumentParser) -> None:
    _takes_run(parser, nargs="+")
    _takes_json(parser)


def _report(options: argparse.Namespace) -> int:
    directories = [find_run(run) for run in options.run]
    from maxpretrain.monitor.report import write_report

    path = write_report(directories)
    print(_json({"report": path}) if options.json else path)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from maxpretrain import doctor, environment

    environment.prepare_process()
    diagnosis = doctor.diagnose()
    print(_json(diagnosis) if options.json else doctor.render(diagnosis))
    return 0 if diagnosis["usable"] else 1


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(_json(result))
        return
    width = max(map(len, result), default=0)
    for name, value in result.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        print(f"{name.ljust(width)}  {f'{value:.6g}' if isinstance(value, float) else value}")


def _json(result: Any) -> str:
    return json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """What JSON has for it: numbers of numpy and jax too, and null for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


VERBS = {
    "train": Verb(
        "prepares data if needed, trains, evaluates, checkpoints, writes the report; run again, it resumes",
        _train_options,
        _train,
        True,
    ),
    "plan": Verb("parameters, FLOPs, memory and hours of a config; trains nothing", _plan_options, _plan, True),
    "prepare": Verb("only the data: documents to token store", _prepare_options, _prepare, True),
    "evaluate": Verb(
        "loss, perplexity and bits per byte of a run on its validation text or any other", _evaluate_options, _evaluate
    ),
    "generate": Verb(
        "continues or answers a text with a run's model, or fills its masks", _generate_options, _generate
    ),
    "export": Verb("a run's network as a Hugging Face directory, checked by loading it", _export_options, _export),
    "import": Verb("a Hugging Face directory made into a run", _import_options, _import),
    "report": Verb("writes report.html again; with several runs, compares them", _report_options, _report),
    "doctor": Verb(
        "devices, versions, kernels in use, what is missing; to paste into a bug report", _takes_json, _doctor
    ),
}
