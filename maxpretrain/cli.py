"""The `maxpretrain` command: verbs to functions.

Nothing heavy is imported until a verb runs, so that `--help` answers at once: not jax, not numpy, and tyro only for overrides.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from maxpretrain import __version__
from maxpretrain.errors import StorageError, UserError, nearest
from maxpretrain.verbs import VERBS, Verb

FAILED, WRONG = 1, 2  # exit statuses; the rest are in errors.py


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `maxpretrain`; None: the process's own.

    Returns:
        The exit status: 0 done, 1 failed, 2 the command line, config or input is wrong, 3 does not fit, 4 storage, 5 diverged,
        75 stopped by a signal after saving.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="replace"
            )  # a generated or printed character that the terminal lacks is no reason to stop
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        status = _dispatch(words, debug)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Who read the output has seen enough (`| head`). Python would complain when it flushes at exit: give it nothing to flush to.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return _end("interrupted; what was saved stays: run the same command again", FAILED, debug)
    except UserError as error:
        return _end(str(error), error.exit_status, debug)
    except OSError as error:
        return _end(*_of_the_system(error, debug), debug)
    except Exception as error:
        return _end(_unexpected(error, debug), FAILED, debug)


def _end(sentence: str, status: int, debug: bool) -> int:
    with contextlib.suppress(BrokenPipeError):
        if debug:
            traceback.print_exc()
        print(f"maxpretrain: {sentence}", file=sys.stderr, flush=True)
    return status


def _of_the_system(error: OSError, debug: bool) -> tuple[str, int]:
    """What the operating system refused: a full disk and a missing permission have statuses of their own."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full{' while writing' + where if where else ''}; free some space and run the same command again",
            StorageError.exit_status,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"no permission for{where or ' a file'} ({error.strerror}); change its permissions, or write elsewhere (--root, MAXPRETRAIN_CACHE)",
            WRONG,
        )
    return _unexpected(error, debug), FAILED


def _unexpected(error: Exception, debug: bool) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    notes = getattr(error, "__notes__", ())
    more = f"; {notes[-1]}" if notes else "" if debug else "; run again with --debug for the traceback"
    return f"{type(error).__name__}: {first[:300]}{place}{more}" if first else f"{type(error).__name__}{place}{more}"


def _dispatch(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else WRONG
    if words[0] in ("--version", "-V"):
        print(f"maxpretrain {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in VERBS:
        hint = f"; did you mean maxpretrain train {name}?" if name.endswith(".py") else nearest(name, VERBS)
        raise UserError(f'unknown command "{name}"{hint}')
    verb = VERBS[name]
    parser = _Parser(prog=f"maxpretrain {name}", description=verb.summary, add_help=False, allow_abbrev=False)
    verb.options(parser)
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if any(word in ("-h", "--help") for word in rest):
        print(_help(name, verb, parser, rest))
        return 0
    if not verb.overrides:
        _require_known_flags(name, parser, rest)
    options, others = parser.parse_known_args(rest)
    if verb.overrides:
        _require_config_first(options.config, rest, others, name)
        options.overrides = others
    elif others:
        raise UserError(f"{name} does not take {others[0]}; see maxpretrain {name} --help")
    options.debug = debug
    return verb.run(options)


def _require_known_flags(name: str, parser: argparse.ArgumentParser, rest: list[str]) -> None:
    """Before argparse, which would rather say that `--prompt` is missing than that `--promt` is none."""
    flags = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in rest:
        flag = word.partition("=")[0]
        if re.fullmatch(r"--[A-Za-z][\w.-]*", flag) and flag not in flags:
            way = "; give the run by its path, such as runs/quickstart" if flag == "--root" else nearest(flag, flags)
            raise UserError(f"{name} does not take {flag}{way.replace(chr(34), '')}")


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints as ours: one sentence, without the usage lines."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("the following arguments are required:", "it needs")
        raise UserError(f"{self.prog.removeprefix('maxpretrain ')}: {message}; see {self.prog} --help")


def _require_config_first(config: str, rest: list[str], others: list[str], name: str) -> None:
    """Before the config is read nobody can tell an override's value from a config: `train --steps 10 x.py`."""
    if others and rest.index(config) > rest.index(others[0]):
        raise UserError(
            f"{name}: {others[0]} stands before the config; write maxpretrain {name} CONFIG [--field value ...]"
        )


def _overview() -> str:
    width = max(map(len, VERBS))
    commands = "\n".join(f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"usage: maxpretrain COMMAND [...]\n\nPretraining of language models in JAX.\n\n{commands}\n\n"
        "Each takes --help. CONFIG is a Python config file or the bare name of one in configs/; RUN is a run directory or a run's\n"
        "name under runs/. Start with: maxpretrain train quickstart"
    )


def _help(name: str, verb: Verb, parser: argparse.ArgumentParser, rest: list[str]) -> str:
    text = parser.format_help().strip()
    if not verb.overrides:
        return text
    try:
        config = parser.parse_known_args([word for word in rest if word not in ("-h", "--help")])[0].config
    except UserError:  # no config was named
        return f"{text}\n\nmaxpretrain {name} CONFIG --help lists every field, with the config's own values."
    from maxpretrain import configio, overrides

    fields = overrides.render_fields(configio.load_config(config))
    return "\n\n".join(filter(None, [text, configio.summary_of(config), "Fields, each set by --FIELD VALUE:", fields]))
