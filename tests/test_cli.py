"""The command line: what it answers, what it passes on to the parts, and the sentence and status where something is wrong."""

import errno
import json
import os
import subprocess
import sys
import types
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

import maxpretrain
from maxpretrain import cli, configio, environment
from maxpretrain.config import Run
from maxpretrain.errors import Diverged, DoesNotFit, Stopped, StorageError, UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = '"""A tiny run."""\nfrom maxpretrain.config import *\nconfig = Run(name="tiny", steps=200, optimizer=OptimizerConfig(peak_lr=0.002))\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with one config, and a process that stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configio, "_PACKAGE", tmp_path / "elsewhere" / "maxpretrain")
    monkeypatch.setattr(environment, "prepare_process", lambda run=None: None)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def fake(monkeypatch):
    """Puts a module of the given functions in the place of a part."""

    def put(name, **attributes):
        module = types.ModuleType(f"maxpretrain.{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent, _, last = name.rpartition(".")
        package = sys.modules.get(f"maxpretrain.{parent}" if parent else "maxpretrain")
        if package is not None:
            monkeypatch.setattr(package, last, module, raising=False)

    return put


@pytest.fixture
def runs(folder):
    for name in ("quickstart", "shakespeare"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.json").write_text(configio.to_json(Run(name=name)))
    (folder / "runs" / "empty").mkdir()
    return folder / "runs"


def said(capsys, *words, status=2):
    """The one sentence on standard error."""
    assert cli.main(list(words)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("maxpretrain: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("maxpretrain: ").rstrip("\n")


def raises(error):
    def part(*args, **kwargs):
        raise error

    return part


# Help and the verbs


def test_version_and_overview(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"maxpretrain {maxpretrain.__version__}\n"
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("train", "plan", "prepare", "evaluate", "generate", "report", "doctor"):
        assert f"\n  {verb} " in text
    assert cli.main([]) == 2
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("verb", ["train", "plan", "prepare", "evaluate", "generate", "report", "doctor"])
def test_each_verb_has_help(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: maxpretrain {verb} ")


def test_help_of_a_config_shows_its_own_defaults(capsys):
    assert cli.main(["train", "tiny", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--fresh" in out
    assert "A tiny run." in out
    assert "learning rate at the top of the schedule (default: 0.002)" in " ".join(out.split())
    assert "optimizer steps (default: 200)" in out
    assert cli.main(["plan", "--target", "v5p-8", "tiny", "--steps", "5", "--help"]) == 0
    assert "optimizer steps (default: 200)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "configs/tiny.py", "--help"], ["generate", "--help"]]
)
def test_help_is_quick_and_imports_nothing_heavy(words):
    code = f"import sys; from maxpretrain.cli import main; main({words!r}); print([m for m in ('jax', 'numpy', 'tyro', 'flax') if m in sys.modules], file=sys.stderr)"
    spent = []
    for _ in range(2):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        after = os.times()
        assert done.stderr == "[]\n"
        assert done.stdout.startswith("usage: maxpretrain")
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 0.3  # seconds of processor time: the machine may be busy with other tests


def test_python_m_maxpretrain():
    done = subprocess.run(
        [sys.executable, "-m", "maxpretrain", "trian"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'maxpretrain: unknown command "trian"; did you mean "train"?\n'


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trian", 'unknown command "trian"; did you mean "train"?'),
        (
            "xyz",
            'unknown command "xyz"; there is: train, plan, prepare, evaluate, generate, export, import, report, doctor',
        ),
        ("configs/tiny.py", 'unknown command "configs/tiny.py"; did you mean maxpretrain train configs/tiny.py?'),
        ("train", "train: it needs CONFIG; see maxpretrain train --help"),
        ("train tinny", 'no config tinny; did you mean "tiny"? (available: tiny)'),
        ("train tiny --optimizer.peek_lr 1", "unknown field --optimizer.peek_lr; did you mean --optimizer.peak_lr?"),
        ("plan tiny --steps many", '--steps is "many"; it takes an integer'),
        ("prepare tiny --steps 0", "steps is 0; it must be at least 1"),
        (
            "train --steps 10 tiny",
            "train: --steps stands before the config; write maxpretrain train CONFIG [--field value ...]",
        ),
        ("train tiny --fresh=1", "train: --fresh: ignored explicit argument '1'; see maxpretrain train --help"),
        ("plan tiny --mfu 2", 'plan: --mfu: "2" is not a number above 0 and at most 1; see maxpretrain plan --help'),
        ("plan tiny --devices 0", 'plan: --devices: "0" is not an integer of at least 1; see maxpretrain plan --help'),
        ("generate x", "generate: it needs --prompt; see maxpretrain generate --help"),
        ("generate x --promt a", "generate does not take --promt; did you mean --prompt?"),
        ("generate x --root a", "generate does not take --root; give the run by its path, such as runs/quickstart"),
        ("generate x --prompt", "generate: --prompt: expected one argument; see maxpretrain generate --help"),
        (
            "generate x --prompt a --temperature -1",
            'generate: --temperature: "-1" is not a number of at least 0; see maxpretrain generate --help',
        ),
        (
            "generate x --prompt a --top-p 0",
            'generate: --top-p: "0" is not a number above 0 and at most 1; see maxpretrain generate --help',
        ),
        (
            "evaluate x --step one",
            'evaluate: --step: "one" is not an integer of at least 0; see maxpretrain evaluate --help',
        ),
        ("evaluate x y", "evaluate does not take y; see maxpretrain evaluate --help"),
        ("report", "report: it needs RUN; see maxpretrain report --help"),
        ("evaluate x", "no run x, here or under runs/; maxpretrain train CONFIG makes one"),
        ("report runs/x", "no run runs/x; maxpretrain train CONFIG makes one"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_one_sentence(words, expected, capsys):
    assert said(capsys, *words.split()) == expected


# What the verbs pass on


def test_train(fake, monkeypatch, folder):
    calls = []
    monkeypatch.setattr(environment, "prepare_process", lambda run: calls.append(("process", run.steps)))
    fake("train", train=lambda run, **options: calls.append((run, options)))
    assert cli.main(["train", "configs/tiny.py"]) == 0
    assert cli.main(["train", "tiny", "--data.train", "a", "b", "--fresh", "--steps", "300", "--mesh.data", "-1"]) == 0
    (first, run, plain), (second, changed, fresh) = [(calls[i], *calls[i + 1]) for i in (0, 2)]
    assert (first, second) == (("process", 200), ("process", 300))
    assert (run.name, run.steps, run.data.train, plain) == (
        "tiny",
        200,
        ("embedded",),
        {"fresh": False, "debug": False},
    )
    assert (changed.steps, changed.data.train, changed.mesh.data, fresh) == (
        300,
        ("a", "b"),
        -1,
        {"fresh": True, "debug": False},
    )
    assert [path.name for path in folder.iterdir()] == ["configs"]


def test_plan(fake, capsys):
    calls = []

    def plan(run, **options):
        calls.append((run.steps, options))
        return types.SimpleNamespace(fits=options["devices"] != 1)

    fake("plan", plan=plan, render=lambda result: f"fits: {result.fits}")
    assert cli.main(["plan", "tiny"]) == 0
    assert capsys.readouterr().out == "fits: True\n"
    assert cli.main(["plan", "tiny", "--steps", "300", "--target", "v5p-8", "--mfu", "0.4", "--devices", "1"]) == 3
    assert capsys.readouterr().out == "fits: False\n"
    assert calls == [
        (200, {"target": None, "mfu": None, "devices": None}),
        (300, {"target": "v5p-8", "mfu": 0.4, "devices": 1}),
    ]


def test_plan_as_json(fake, capsys):
    fake("plan", plan=lambda run, **_: {"parameters": 3, "hours": float("nan"), "path": Path("a"), "parts": (1, None)})
    assert cli.main(["plan", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"parameters": 3, "hours": None, "path": "a", "parts": [1, None]}


def test_prepare(fake, capsys):
    def store(name, n):
        return types.SimpleNamespace(path=Path(name), num_tokens=10 * n, num_documents=n, num_bytes=40 * n)

    def prepare(run):
        return types.SimpleNamespace(
            tokenizer=types.SimpleNamespace(vocab_size=4096),
            train=(store("a", 3), store("b", 4)),
            validation=(store("c", 1),),
            baselines={"unigram_bits_per_byte": 2.75, "bigram_bits_per_byte": 2.25},
        )

    fake("data.prepare", prepare=prepare)
    assert cli.main(["prepare", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "vocab_size": 4096,
        "train_tokens": 70,
        "train_documents": 7,
        "train_bytes": 280,
        "train_stores": ["a", "b"],
        "validation_tokens": 10,
        "validation_documents": 1,
        "validation_bytes": 40,
        "validation_stores": ["c"],
        "unigram_bits_per_byte": 2.75,
        "bigram_bits_per_byte": 2.25,
    }
    assert cli.main(["prepare", "tiny"]) == 0
    assert "train_stores           a, b\n" in capsys.readouterr().out


def test_evaluate(fake, runs, capsys):
    calls = []

    def evaluate_run(run_dir, data=None, step=None):
        calls.append((run_dir, data, step))
        return {"loss": 1.25, "perplexity": 3.4903429574618414, "step": 7}

    fake("evaluate", evaluate_run=evaluate_run)
    assert cli.main(["evaluate", "quickstart"]) == 0
    assert capsys.readouterr().out == "loss        1.25\nperplexity  3.49034\nstep        7\n"
    assert cli.main(["evaluate", "runs/quickstart/", "--data", "a.txt", "--step", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": 1.25, "perplexity": 3.4903429574618414, "step": 7}
    assert calls == [(Path("runs/quickstart"), None, None), (Path("runs/quickstart"), "a.txt", 7)]


def test_numbers_of_numpy_are_json_too(fake, runs, capsys):
    np = pytest.importorskip("numpy")
    fake(
        "evaluate",
        evaluate_run=lambda *_, **__: {
            "loss": np.float32(1.5),
            "bad": np.float64("inf"),
            "n": np.int64(3),
            "a": np.arange(2),
        },
    )
    assert cli.main(["evaluate", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": 1.5, "bad": None, "n": 3, "a": [0, 1]}


@pytest.fixture
def generated(fake, runs):
    calls = []

    class Loaded:
        config = SimpleNamespace(model=SimpleNamespace(architecture="decoder"))

        def __init__(self, directory, step):
            self.directory, self.step = directory, step

        def generate(self, prompts, *, stream=None, **options):
            calls.append((self.directory, prompts, stream is not None, options | {"step": self.step}))
            texts = [" upon a time", " more"][: len(prompts)]
            for i, text in enumerate(texts):
                for piece in text.split("p") if stream else ():
                    stream(i, piece)
            return texts

        def answers(self, prompt):
            return self.config.model.architecture == "encoder-decoder"

        def fill(self, prompts):
            Candidate = namedtuple("Candidate", "id text probability")
            candidates = [Candidate(3, " time", 0.625), Candidate(4, "\n", 0.25)]
            return [[candidates, candidates[:1]] for _ in prompts]

    fake("api", load=Loaded)
    return SimpleNamespace(calls=calls, model=Loaded.config.model)


def test_generate_streams_one_prompt(generated, capsys):
    assert cli.main(["generate", "quickstart", "--prompt", "Once"]) == 0
    assert capsys.readouterr().out == "Once uon a time\n"  # the pieces, as they came
    defaults = {"max_new_tokens": 100, "temperature": 0.8, "top_k": None, "top_p": None, "seed": 0, "step": None}
    assert generated.calls == [(Path("runs/quickstart"), ["Once"], True, defaults)]


def test_generate_prints_several_prompts_when_done(generated, capsys):
    options = "--max-new-tokens 5 --temperature 0 --top-k 3 --top-p 0.9 --seed 4 --step 7"
    assert cli.main(["generate", "quickstart", "--prompt", "Once", "--prompt=-- and", *options.split()]) == 0
    assert capsys.readouterr().out == "Once upon a time\n\n-- and more\n"
    given = {"max_new_tokens": 5, "temperature": 0.0, "top_k": 3, "top_p": 0.9, "seed": 4, "step": 7}
    assert generated.calls == [(Path("runs/quickstart"), ["Once", "-- and"], False, given)]


def test_generate_as_json(generated, capsys):
    assert cli.main(["generate", "quickstart", "--prompt", "Once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"prompt": "Once", "text": " upon a time"}]
    assert generated.calls[0][2] is False


def test_a_middle_is_completed(generated, capsys):
    ask = lambda *options: cli.main(["generate", "quickstart", "--prompt", "Once", *options])  # noqa: E731
    assert ask("--suffix", " there was") == 0
    assert ask("--prompt", "and", "--suffix", "!") == 0
    assert ask("--prompt", "and", "--suffix", "!", "--suffix=?") == 0
    streamed, *others = capsys.readouterr().out.split("\n", 1)
    assert streamed == "Once uon a time there was"
    assert others == ["Once upon a time!\n\nand more!\nOnce upon a time!\n\nand more?\n"]
    assert [call[3].get("suffix") for call in generated.calls[1::2]] == [[" there was"], ["!", "!"], ["!", "?"]]
    assert ask("--suffix", "!", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"prompt": "Once", "text": " upon a time", "suffix": "!"}]
    assert ask("--suffix", "!", "--suffix", "?") == 2
    said = capsys.readouterr()
    assert "generate: 2 --suffix for 1 --prompt; give one for all, or one for each" in said.err
    assert "Once" not in said.out


def test_an_encoder_decoder_answers(generated, capsys):
    generated.model.architecture = "encoder-decoder"
    assert cli.main(["generate", "quickstart", "--prompt", "Once"]) == 0
    assert cli.main(["generate", "quickstart", "--prompt", "Once", "--prompt", "and"]) == 0
    assert capsys.readouterr().out == " uon a time\n upon a time\n\n more\n"
    assert [call[3]["temperature"] for call in generated.calls] == [0.8, 0.8]


def test_an_encoder_fills_masks(generated, capsys):
    generated.model.architecture = "encoder"
    assert cli.main(["generate", "quickstart", "--prompt", "Once upon a [MASK]"]) == 0
    expected = ' upon a time\n  mask 1: " time" 62.5%, "⏎" 25.0%\n  mask 2: " time" 62.5%\n'
    assert capsys.readouterr().out == expected
    assert (generated.calls[0][2], generated.calls[0][3]["temperature"]) == (False, 0.0)
    assert cli.main(["generate", "quickstart", "--prompt", "a", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["text"]) == ("a", " upon a time")
    assert found["masks"][1] == [{"id": 3, "text": " time", "probability": 0.625}]


def test_report(fake, runs, capsys):
    import maxpretrain.monitor  # noqa: F401  the fake is put into the package

    calls = []
    fake("monitor.report", write_report=lambda run_dirs: calls.append(run_dirs) or Path("runs/quickstart/report.html"))
    assert cli.main(["report", "quickstart", "runs/shakespeare"]) == 0
    assert capsys.readouterr().out == "runs/quickstart/report.html\n"
    assert cli.main(["report", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "runs/quickstart/report.html"}
    assert calls == [[Path("runs/quickstart"), Path("runs/shakespeare")], [Path("runs/quickstart")]]


def test_doctor(fake, capsys):
    found = {"usable": True}
    fake("doctor", diagnose=lambda: found, render=lambda report: "all well")
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "all well\n"
    found["usable"] = False
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"usable": False}


def test_a_run_is_found_by_path_or_name(runs, capsys):
    assert said(capsys, "evaluate", "quikstart") == 'no run quikstart, here or under runs/; did you mean "quickstart"?'
    assert (
        said(capsys, "evaluate", "nothing") == "no run nothing, here or under runs/; there is: quickstart, shakespeare"
    )
    assert (
        said(capsys, "evaluate", "empty")
        == "runs/empty is not a run directory: it has no config.json; there is: quickstart, shakespeare"
    )
    assert (
        said(capsys, "evaluate", "configs")
        == "configs is not a run directory: it has no config.json; there is: quickstart, shakespeare"
    )


# How it ends


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (UserError("batch is wrong"), 2, "batch is wrong"),
        (DoesNotFit("too big"), 3, "too big"),
        (StorageError("no checkpoint"), 4, "no checkpoint"),
        (Diverged("loss is nan"), 5, "loss is nan"),
        (
            Stopped("stopped at step 7; run the same command to go on"),
            75,
            "stopped at step 7; run the same command to go on",
        ),
        (KeyboardInterrupt(), 1, "interrupted; what was saved stays: run the same command again"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            4,
            "the disk is full while writing a/b; free some space and run the same command again",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            2,
            "no permission for a/b (Permission denied); change its permissions, or write elsewhere (--root, MAXPRETRAIN_CACHE)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_status_and_sentence(error, status, expected, fake, capsys):
    fake("train", train=raises(error))
    assert said(capsys, "train", "tiny", status=status) == expected


def test_what_nobody_expected_is_one_sentence_too(fake, capsys):
    fake("train", train=raises(RuntimeError("RESOURCE_EXHAUSTED: out of memory\n  kilobytes of text")))
    assert said(capsys, "train", "tiny", status=1) == (
        f"RuntimeError: RESOURCE_EXHAUSTED: out of memory (test_cli.py, line {raises.__code__.co_firstlineno + 2}); run again with --debug for the traceback"
    )
    fake("train", train=raises(AssertionError()))
    assert said(capsys, "train", "tiny", status=1).startswith("AssertionError (test_cli.py, line ")


def test_the_traceback_of_a_run_is_kept_in_its_log(fake, capsys, folder):
    def train(run, fresh, debug=False):
        (folder / "runs" / "tiny").mkdir(parents=True)
        raise RuntimeError("after hours")

    fake("train", train=train)
    assert said(capsys, "train", "tiny", status=1).endswith("; the traceback is in runs/tiny/log.txt")
    log = (folder / "runs" / "tiny" / "log.txt").read_text()
    assert log.startswith("Traceback (most recent call last):")
    assert log.endswith("RuntimeError: after hours\n")


@pytest.mark.parametrize("words", [["--debug", "train", "tiny"], ["train", "tiny", "--debug"]])
def test_debug_shows_the_traceback(words, fake, capsys):
    fake("train", train=raises(UserError("wrong")))
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):")
    assert err.endswith("maxpretrain: wrong\n")


def test_head_closes_the_pipe_and_nothing_is_said():
    code = "import sys, maxpretrain.cli as c; c._overview = lambda: 'x\\n' * 1000000; sys.exit(c.main(['--help']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.readline() == b"x\n"
    child.stdout.close()
    assert child.wait(timeout=30) == 1
    assert child.stderr.read() == b""
    child.stderr.close()


def test_a_terminal_without_the_character_gets_another():
    code = "import maxpretrain.cli as c; c._overview = lambda: 'Σ'; c.main(['--help'])"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("?\n", "")
