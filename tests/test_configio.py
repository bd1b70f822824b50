"""Config files, JSON and overrides: what a Run becomes, and the sentence where it does not."""

import dataclasses
import json
import re
import sys

import pytest

import maxpretrain as mp
from maxpretrain import configio, overrides, schema
from maxpretrain.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    Run,
    ScheduleConfig,
)
from maxpretrain.configio import apply_overrides, from_json, load_config, to_dict, to_json
from maxpretrain.errors import UserError
from maxpretrain.objectives import CLM, SpanCorruption

FULL = Run(
    name="full",
    seed=4294967295,
    model=ModelConfig(vocab_size=None, num_kv_heads=4, rope=RopeConfig(theta=500000.0), norm_eps=1e-5, qkv_bias=False),
    objective=CLM(mask_documents=False, z_loss=1e-4),
    data=DataConfig(train=("a.txt", "b.txt"), weights=(0.1, 0.30000000000000004)),
    optimizer=OptimizerConfig(peak_lr=0.1 + 0.2, clip_norm=None, schedule=ScheduleConfig(boundaries=(1, 2))),
    evaluation=EvaluationConfig(prompts=('a "quoted"\nline', "naïve — 漢字", "\ud800")),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configio, "_PACKAGE", tmp_path / "elsewhere" / "maxpretrain")
    (tmp_path / "configs").mkdir()
    return tmp_path


def write(folder, text, name="x.py"):
    (folder / "configs" / name).write_text(
        "from maxpretrain.config import *\nfrom maxpretrain.objectives import CLM\n" + text
    )
    return f"configs/{name}"


def sentence(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert error.value.exit_status == 2
    return str(error.value)


# Files


def test_a_file_defines_config_as_a_run_or_a_function(folder):
    assert load_config(write(folder, "config = Run(steps=7)")) == Run(steps=7)
    assert load_config(write(folder, "def config() -> Run:\n    return Run(steps=8)")) == Run(steps=8)
    assert load_config(write(folder, "config: Run = Run(steps=9)")).steps == 9


def test_a_bare_name_is_found_here_then_in_the_checkout_then_in_the_package(folder):
    package = folder / "elsewhere" / "maxpretrain" / "_configs"
    checkout = folder / "elsewhere" / "configs"
    for place, name, steps in [(package, "a", 1), (package, "b", 2), (package, "c_d", 3), (checkout, "b", 4)]:
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.py").write_text(f"from maxpretrain.config import Run\nconfig = Run(steps={steps})")
    write(folder, "config = Run(steps=5)", "a.py")
    assert [load_config(name).steps for name in ("a", "b", "c_d", "c-d")] == [5, 4, 3, 3]
    assert list(configio.available()) == ["a", "b", "c_d"]


def test_not_found(folder):
    assert sentence(load_config, "x") == "no config x; give the path of a Python file that defines `config: Run`"
    write(folder, "", "quickstart.py")
    write(folder, "", "gpt2_124m.py")
    assert (
        sentence(load_config, "quikstart")
        == 'no config quikstart; did you mean "quickstart"? (available: gpt2_124m, quickstart)'
    )
    assert (
        sentence(load_config, "gpt-124m")
        == 'no config gpt-124m; did you mean "gpt2_124m"? (available: gpt2_124m, quickstart)'
    )
    assert sentence(load_config, "zzz") == "no config zzz; there is: gpt2_124m, quickstart"
    assert sentence(load_config, "other/quickstart.py") == (
        'config file other/quickstart.py not found; did you mean "quickstart"? (available: gpt2_124m, quickstart)'
    )
    assert sentence(load_config, "configs/").startswith("configs/ is a folder, not a config file; there is: gpt2_124m")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "defines no `config`; add `config = Run(…)` or `def config() -> Run`"),
        ("Config = Run()", "defines no `config`, but `Config`; add `config = Run(…)` or `def config() -> Run`"),
        ("config = {}", "defines `config` as a dict, not a Run; build it with maxpretrain.config.Run(…)"),
        ("config = Run", "defines `config` as a type, not a Run; build it with maxpretrain.config.Run(…)"),
        (
            "def config():\n    return 3",
            "defines `config` as an int, not a Run; build it with maxpretrain.config.Run(…)",
        ),
        ("config = Run(", ", line 3: SyntaxError: '(' was never closed"),
        ("\nconfig = Run(steps=1/0)", ", line 4: ZeroDivisionError: division by zero"),
        ("def f():\n    return nope\nconfig = f()", ", line 4: NameError: name 'nope' is not defined"),
        ("def config():\n    import nowhere_at_all", ", line 4: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def config(x):\n    pass", ": TypeError: config() missing 1 required positional argument: 'x'"),
        ("raise SystemExit(3)", ", line 3: SystemExit: 3"),
        ("raise KeyError", ", line 3: KeyError"),
        ("raise ValueError('a\\n  b')", ", line 3: ValueError: a b"),
        (
            "config = Run(optimizer=OptimizerConfig(peek_lr=1.0))",
            ", line 3: TypeError: OptimizerConfig.__init__() got an unexpected keyword argument 'peek_lr'; did you mean peak_lr?",
        ),
        (
            "config = Run(objective=CLM(zloss=1.0))",
            ", line 3: TypeError: CLM.__init__() got an unexpected keyword argument 'zloss'; did you mean z_loss?",
        ),
        ("config = Run(steps='7')", ': steps is "7"; it takes an integer'),
        ("config = Run(steps=True)", ": steps is True (bool); it takes an integer"),
        ("config = Run(steps=7.0)", ": steps is 7.0 (float); it takes an integer"),
        ("config = Run(optimizer=OptimizerConfig(peak_lr=None))", ": optimizer.peak_lr is None; it takes a number"),
        (
            "config = Run(optimizer=OptimizerConfig(eps=float('nan')))",
            ": optimizer.eps is nan (float); it takes a finite number",
        ),
        ("config = Run(data=DataConfig(train='a.txt'))", ': data.train is "a.txt"; it takes texts'),
        ("config = Run(data=DataConfig(train=('a', 3)))", ": data.train[1] is 3 (int); it takes a text"),
        (
            "config = Run(model=ModelConfig(norm='x'))",
            ': model.norm is "x"; it takes one of "layernorm", "rmsnorm", "rmsnorm_offset"',
        ),
        ("config = Run(model=ModelConfig(qkv_bias=1))", ": model.qkv_bias is 1 (int); it takes true or false, or None"),
        ("config = Run(model=5)", ": model is an int; it takes a ModelConfig"),
        ("config = Run(objective='CLM')", ": objective is a str; it takes an Objective"),
        (
            "config = Run(optimizer=OptimizerConfig(schedule=OptimizerConfig()))",
            ": optimizer.schedule is an OptimizerConfig; it takes a ScheduleConfig",
        ),
        ("config = Run(model=BatchConfig())", ": model is a BatchConfig; it takes a ModelConfig"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_sentence(folder, text, expected):
    path = write(folder, text)
    said = sentence(load_config, path)
    assert said.removeprefix(path).lstrip() == expected.lstrip()
    assert "\n" not in said


def test_an_error_deep_in_a_library_names_the_line_of_the_config(folder):
    path = write(folder, "import json\n\nconfig = json.loads('{')")
    assert sentence(load_config, path).startswith("configs/x.py, line 5: JSONDecodeError: ")


def test_lists_and_paths_are_welcome_in_python(folder):
    run = load_config(
        write(
            folder, "from pathlib import Path\nconfig = Run(data=DataConfig(train=[Path('a') / 'b.txt'], weights=[2]))"
        )
    )
    assert run.data.train == ("a/b.txt",)
    assert run.data.weights == (2.0,)
    assert type(run.data.weights[0]) is float


def test_a_config_may_import_its_neighbour_and_shadows_no_library(folder):
    write(folder, "config = Run(steps=3)", "base_of_a_test.py")
    (folder / "configs" / "wave.py").write_text("raise RuntimeError('shadowed')")
    path = write(folder, "import wave\nfrom base_of_a_test import config as base\nconfig = base.replace(seed=5)")
    before = list(sys.path)
    assert load_config(path) == Run(steps=3, seed=5)
    assert sys.path == before


def test_a_dataclass_in_a_config_file_works(folder):
    text = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Size:\n    n: int = 4\nfrom maxpretrain.config import Run\nconfig = Run(steps=Size().n)"
    (folder / "configs" / "x.py").write_text(text)
    assert load_config("x").steps == 4


def test_an_unreadable_file(folder):
    (folder / "configs" / "x.py").write_bytes(b"\xff\xfe config")
    assert sentence(load_config, "x").startswith("config file configs/x.py cannot be read: 'utf-8' codec can't decode")


def test_resolve_loads_overrides_and_validates(folder):
    write(folder, "config = Run(steps=0)")
    assert configio.resolve("x", ["--steps", "200"]).steps == 200
    assert sentence(configio.resolve, "x") == "steps is 0; it must be at least 1"


# JSON


def test_json_round_trip_is_exact():
    again = from_json(to_json(FULL))
    assert again == FULL
    assert type(again.objective) is CLM
    assert from_json(json.loads(to_json(FULL))) == FULL
    assert to_json(again) == to_json(FULL)


def test_every_field_is_written():
    written = to_dict(FULL)
    assert written["objective"] == {"type": "CLM", "mask_documents": False, "label_smoothing": 0.0, "z_loss": 0.0001}
    assert written["evaluation"]["prompts"][1] == "naïve — 漢字"
    assert written["optimizer"]["peak_lr"] == 0.30000000000000004
    assert list(written) == [field.name for field in dataclasses.fields(Run)]
    assert {name: part for name, part in written.items() if name != "objective"} == {
        name: part for name, part in json.loads(json.dumps(dataclasses.asdict(FULL))).items() if name != "objective"
    }


def edited(**changes):
    data = to_dict(Run())
    for name, value in changes.items():
        *parents, last = name.split("__")
        part = data
        for parent in parents:
            part = part[parent]
        part[last] = value
    return data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            "{",
            "config.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("[1]", "config.json: the whole is a list; it takes the fields of a Run"),
        ('{"steps": 1, "steps": 2}', 'config.json is not valid JSON: "steps" is given twice'),
        (b"\xff", None),
        ("[" * 100_000, None),
        (edited(optimizer__peek_lr=1), "config.json: unknown field optimizer.peek_lr; did you mean optimizer.peak_lr?"),
        (edited(stepz=1), "config.json: unknown field stepz; did you mean steps?"),
        (edited(objective__zloss=1), "config.json: unknown field objective.zloss; did you mean objective.z_loss?"),
        (edited(steps=7.0), "config.json: steps is 7.0 (float); it takes an integer"),
        (edited(steps=None), "config.json: steps is None; it takes an integer"),
        (edited(model__bias=1), "config.json: model.bias is 1 (int); it takes true or false"),
        (
            edited(model__norm="Rms"),
            'config.json: model.norm is "Rms"; it takes one of "layernorm", "rmsnorm", "rmsnorm_offset"',
        ),
        (edited(model=[]), "config.json: model is a list; it takes the fields of a ModelConfig"),
        (edited(objective={}), "config.json: objective has no type; it takes one of "),
        (
            edited(objective={"type": "os"}),
            "config.json: objective.type 'os' is no objective of maxpretrain.objectives",
        ),
        (edited(optimizer__eps=float("inf")), "config.json: optimizer.eps is inf (float); it takes a finite number"),
    ],
)
def test_json_is_read_strictly(data, expected):
    said = sentence(from_json, data, where="config.json")
    if expected is None:
        assert said.startswith("config.json is not valid JSON: ")
    elif "type" in expected:  # other objectives may have been added
        assert said.startswith(expected)
    else:
        assert said == expected


def test_an_integer_is_a_number_but_not_the_reverse():
    run = from_json(edited(optimizer__peak_lr=1))
    assert run.optimizer.peak_lr == 1.0
    assert type(run.optimizer.peak_lr) is float


def test_a_missing_key_takes_the_default_and_says_so():
    data = to_dict(FULL)
    del data["model"]["qkv_bias"], data["model"]["norm_eps"], data["log"]
    with pytest.warns(UserWarning, match="not given") as warned:
        run = from_json(data, where="config.json")
    assert run == dataclasses.replace(FULL, model=dataclasses.replace(FULL.model, qkv_bias=None, norm_eps=1e-5))
    assert [str(w.message) for w in warned] == [
        "config.json: log not given; the default is taken",
        "config.json: model.norm_eps, model.qkv_bias not given; the default is taken",
    ]


def test_a_saved_config_is_data_and_never_run(tmp_path):
    assert sentence(configio.read_saved, tmp_path).startswith(
        f"{tmp_path} is not a run directory: its config.json cannot be read"
    )
    (tmp_path / "config.json").write_text(to_json(FULL))
    assert configio.read_saved(tmp_path) == FULL
    assert load_config(tmp_path / "config.json") == FULL
    (tmp_path / "config.json").write_text("open('executed', 'w')")
    assert "is not valid JSON" in sentence(configio.read_saved, tmp_path)
    assert "is not valid JSON" in sentence(load_config, tmp_path / "config.json")


def test_checked_serves_the_python_api():
    assert configio.checked(Run(data=DataConfig(train=["a"]))).data.train == ("a",)
    assert sentence(configio.checked, Run(steps="7")) == 'the config: steps is "7"; it takes an integer'


# Overrides


def set_to(*args, run=FULL):
    """The fields that differ after the overrides, by dotted name."""
    after = {field.name: field.value for field in schema.leaves(apply_overrides(run, list(args)))}
    before = {field.name: field.value for field in schema.leaves(run)}
    assert after.keys() == before.keys()
    return {name: value for name, value in after.items() if value != before[name]}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--steps 5", {"steps": 5}),
        ("--steps=5", {"steps": 5}),
        ("--steps 5 --steps 6", {"steps": 6}),
        ("--optimizer.peak_lr 1e-3", {"optimizer.peak_lr": 0.001}),
        ("--optimizer.peak-lr=1e-3", {"optimizer.peak_lr": 0.001}),
        ("--optimizer.peak_lr 2", {"optimizer.peak_lr": 2.0}),
        ("--optimizer.peak_lr -1e-3", {"optimizer.peak_lr": -0.001}),
        ("--optimizer.schedule.warmup 20 --batch.length 2048", {"optimizer.schedule.warmup": 20, "batch.length": 2048}),
        ("--mesh.data 4 --mesh.fsdp -1", {"mesh.data": 4, "mesh.fsdp": -1}),
        ("--data.no-shuffle", {"data.shuffle": False}),
        ("--data.no_shuffle", {"data.shuffle": False}),
        ("--data.shuffle false", {"data.shuffle": False}),
        ("--data.shuffle=False", {"data.shuffle": False}),
        ("--data.shuffle false --data.shuffle", {}),
        ("--model.gated", {"model.gated": True}),
        ("--model.gated true --steps 5", {"model.gated": True, "steps": 5}),
        ("--model.qkv_bias true", {"model.qkv_bias": True}),
        ("--model.qkv_bias None", {"model.qkv_bias": None}),
        (
            "--objective.mask_documents --objective.z_loss 1e-5",
            {"objective.mask_documents": True, "objective.z_loss": 1e-5},
        ),
        ("--optimizer.clip_norm 0.5", {"optimizer.clip_norm": 0.5}),
        ("--model.num_kv_heads None", {"model.num_kv_heads": None}),
        ("--model.num_kv_heads none", {"model.num_kv_heads": None}),
        ("--model.position none", {"model.position": "none"}),
        ("--data.train a.txt *.jsonl tfds:x --steps 5", {"data.train": ("a.txt", "*.jsonl", "tfds:x"), "steps": 5}),
        ("--data.train=a.txt", {"data.train": ("a.txt",)}),
        ("--data.weights 1 2.5", {"data.weights": (1.0, 2.5)}),
        ("--data.weights", {"data.weights": ()}),
        ("--optimizer.schedule.boundaries 10 20 30", {"optimizer.schedule.boundaries": (10, 20, 30)}),
        ("--name None", {"name": "None"}),
        ("--root=--here", {"root": "--here"}),
        ("--data.separator=", {}),
        ("--evaluation.prompts=-x", {"evaluation.prompts": ("-x",)}),
        ("--evaluation.prompts=", {"evaluation.prompts": ("",)}),
    ],
)
def test_overrides(args, expected):
    assert set_to(*args.split()) == expected


def test_texts_with_blanks_and_equals_signs():
    assert set_to("--evaluation.prompts", "once upon", "a=b", "", "c") == {
        "evaluation.prompts": ("once upon", "a=b", "", "c")
    }
    assert set_to("--data.separator", "\n\n") == {"data.separator": "\n\n"}


def test_nothing_to_override_changes_nothing():
    assert apply_overrides(FULL, []) is FULL


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--optimizer.peek_lr 1", "unknown field --optimizer.peek_lr; did you mean --optimizer.peak_lr?"),
        ("--optimizer.peek-lr=1", "unknown field --optimizer.peek_lr; did you mean --optimizer.peak_lr?"),
        ("--peak_lr 1", "unknown field --peak_lr; did you mean --optimizer.peak_lr?"),
        ("--peek_lr 1", "unknown field --peek_lr; did you mean --optimizer.peak_lr?"),
        ("--model.warmup 1", "unknown field --model.warmup; did you mean --optimizer.schedule.warmup?"),
        ("--batch_size 1", "unknown field --batch_size; did you mean --batch.size?"),
        ("--max_steps 1", "unknown field --max_steps; did you mean --steps?"),
        ("--qqq 1", "unknown field --qqq; --help lists all fields"),
        (
            "--batch 1",
            "unknown field --batch; it is a group of fields: --batch.size, --batch.length, --batch.microbatches",
        ),
        ("--steps", "--steps has no value; it takes an integer"),
        ("--steps --seed 3", "--steps has no value; it takes an integer"),
        ("--steps many", '--steps is "many"; it takes an integer'),
        ("--steps 1e3", '--steps is "1e3"; it takes an integer'),
        ("--steps 1.0", '--steps is "1.0"; it takes an integer'),
        ("--steps None", '--steps is "None"; it takes an integer'),
        ("--steps=", '--steps is ""; it takes an integer'),
        ("--optimizer.peak_lr fast", '--optimizer.peak_lr is "fast"; it takes a number'),
        ("--optimizer.peak_lr nan", '--optimizer.peak_lr is "nan"; it takes a finite number'),
        ("--optimizer.clip_norm x", '--optimizer.clip_norm is "x"; it takes a number, or None'),
        ("--data.shuffle maybe", '--data.shuffle is "maybe"; it takes true or false'),
        ("--data.no_shuffle=true", "the flag that says no to --data.shuffle takes no value; write --data.shuffle true"),
        ("--data.weights 1 two", '--data.weights is "two"; it takes a number'),
        ("--model.norm rms", '--model.norm is "rms"; it takes one of "layernorm", "rmsnorm", "rmsnorm_offset"'),
        ("--no_steps", "unknown field --no_steps; did you mean --steps?"),
        ("--steps 5 6", '"6" belongs to no flag; overrides are written --field value, as --steps 100'),
        ("steps=5", '"steps=5" belongs to no flag; overrides are written --field value, as --steps 100'),
        ("-s 5", '"-s" belongs to no flag; overrides are written --field value, as --steps 100'),
        (
            "--evaluation.prompts a -b",
            '--evaluation.prompts holds "-b", which looks like a flag; give several values that begin with "-" in the config file',
        ),
    ],
)
def test_a_wrong_override_is_one_sentence(args, expected, capsys):
    assert sentence(apply_overrides, FULL, args.split()) == expected
    assert capsys.readouterr() == ("", "")


def test_every_field_can_be_overridden():
    """Each field, set to what it has, through the command line: no name or type that tyro reads otherwise than we do."""
    args = []
    for field in schema.leaves(FULL):
        if field.name == "evaluation.prompts":  # a text that begins with a lone surrogate is no command line
            continue
        values = field.value if isinstance(field.value, tuple) else (field.value,)
        args += [f"--{field.name}", *(repr(value) if isinstance(value, float) else str(value) for value in values)]
    args = [arg for arg in args if arg != ""] if "" not in args else _with_equals(args)
    assert apply_overrides(FULL, args) == FULL


def _with_equals(args):
    """`--field ""` as `--field=`, which is how a shell user would write an empty text."""
    joined = []
    for arg in args:
        if arg == "":
            joined[-1] += "="
        else:
            joined.append(arg)
    return joined


def test_help_lists_every_field_with_the_values_at_hand():
    text = overrides.render_fields(FULL, width=120)
    flags = re.findall(r"^  --(\S+)", text, re.MULTILINE)
    assert flags == [field.name for field in schema.leaves(FULL)]
    assert (
        "--optimizer.peak_lr FLOAT       learning rate at the top of the schedule (default: 0.30000000000000004)"
        in text
    )
    assert (
        "--model.norm {layernorm,rmsnorm,rmsnorm_offset}\n                                  rmsnorm_offset multiplies by 1 + scale (default: layernorm)"
        in text
    )
    assert "--data.train [TEXT ...]         sources of training documents (default: a.txt b.txt)" in text
    assert "\nobjective, CLM: L = " in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_every_field_says_what_it_is():
    assert [field.name for field in schema.leaves(Run()) if not field.help] == []


def test_comments_are_read_past_long_types_and_hashes(tmp_path, monkeypatch):
    (tmp_path / "commented.py").write_text(
        "import dataclasses\nfrom typing import Literal\n\n@dataclasses.dataclass\nclass Base:\n    a: int = 1  # first\n"
        '    b: str = "#"  # second\n\n    def f(self):\n        x: int = 3  # none\n\n@dataclasses.dataclass\nclass Part(Base):\n'
        '    c: Literal[\n        "x",\n        "y",\n    ] = "x"  # third\n    d: int = 4\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    import commented

    assert schema.comments_of(commented.Part) == {"a": "first", "b": "second", "c": "third"}


def test_a_batch_is_what_it_says():
    assert from_json(edited(batch={"size": 3, "length": 5, "microbatches": 1})).batch == BatchConfig(size=3, length=5)


def test_a_field_of_an_earlier_version_is_left_out():
    with pytest.warns(UserWarning, match=r"config.json: evaluation.batches is no more, and evaluation.windows counts"):
        run = from_json(json.dumps(edited(evaluation__batches=7)), where="config.json")
    assert run.evaluation == EvaluationConfig()


def test_python_takes_only_what_a_file_would():
    odd = Run(objective=SpanCorruption(decoder_format="both"), model=ModelConfig(model_dim=16, num_heads=2))
    for verb in (mp.train, mp.plan):
        with pytest.raises(
            UserError, match=r'objective.decoder_format is "both"; it takes one of "none", "prefix", "causal"'
        ):
            verb(odd)
