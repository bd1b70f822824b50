"""Every sentence that `config.validate` can end with, word for word."""

import dataclasses

import pytest

from maxpretrain.config import Run, validate
from maxpretrain.errors import UserError
from maxpretrain.objectives import CLM


def changed(config, name, value):
    """`config` with the field of this dotted name set to another value."""
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


def run_with(**changes):
    run = Run()
    for name, value in changes.items():
        run = changed(run, name.replace("__", "."), value)
    return run


def test_the_default_run_is_valid():
    assert validate(Run()) is None


SENTENCES = [
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"seed": -1}, "seed is -1; it must be in [0, 2**32)"),
    ({"name": "a/b"}, 'name "a/b" is not a folder name; use letters, digits, "-" and "_"'),
    ({"name": ".."}, 'name ".." is not a folder name; use letters, digits, "-" and "_"'),
    ({"name": ""}, 'name "" is not a folder name; use letters, digits, "-" and "_"'),
    ({"batch__size": 0}, "batch.size is 0; it must be at least 1"),
    ({"batch__length": 0}, "batch.length is 0; it must be at least 1"),
    (
        {"batch__size": 10, "batch__microbatches": 4},
        "batch.size 10 is not divisible by batch.microbatches 4; use batch.size 12",
    ),
    ({"model__num_layers": 0}, "model.num_layers is 0; it must be at least 1"),
    (
        {"model__model_dim": 100},
        "model.model_dim 100 is not divisible by model.num_heads 12; use 96 or 108, or set model.head_dim",
    ),
    (
        {"model__num_kv_heads": 5},
        "model.num_heads 12 is not divisible by model.num_kv_heads 5; use 1 or 2 or 3 or 4 or 6 or 12",
    ),
    (
        {"model__position": "rope", "model__head_dim": 63},
        "rotary positions need an even head width; model.head_dim is 63",
    ),
    (
        {"batch__length": 2048},
        "batch.length 2048 is longer than model.max_length 1024; raise model.max_length or shorten batch.length",
    ),
    ({"model__dropout": 1.0}, "model.dropout is 1.0; it must be in [0, 1)"),
    ({"model__vocab_size": 1}, "model.vocab_size is 1; it must be at least 2"),
    (
        {"steps": 50},
        "optimizer.schedule.warmup is 100 steps, but the whole run has 50; lengthen the run, or give --optimizer.schedule.warmup 5",
    ),
    (
        {"optimizer__schedule__final": -0.1},
        "optimizer.schedule.final is -0.1; it is a factor of the peak, at least 0",
    ),
    (
        {"optimizer__schedule__decay": 901},
        "optimizer.schedule.decay is 901; after the warmup of 100 only 900 steps remain",
    ),
    (
        {"optimizer__schedule__boundaries": (200, 100)},
        "optimizer.schedule.boundaries (200, 100) must rise strictly",
    ),
    (
        {"optimizer__schedule__shape": "step"},
        'optimizer.schedule.shape "step" needs optimizer.schedule.boundaries',
    ),
    (
        {"optimizer__schedule__shape": "exponential", "optimizer__schedule__rate": 0.0},
        "optimizer.schedule.rate is 0.0; it must be above 0",
    ),
    ({"optimizer__schedule__cycle": 0}, "optimizer.schedule.cycle is 0; it must be above 0"),
    ({"optimizer__peak_lr": 0.0}, "optimizer.peak_lr is 0.0; it must be above 0"),
    ({"optimizer__b2": 1.0}, "optimizer.b2 is 1.0; it must be in [0, 1)"),
    (
        {"optimizer__clip_norm": 0.0},
        "optimizer.clip_norm is 0.0; it must be above 0, or None for no clipping",
    ),
    (
        {"optimizer__clip_value": -1.0},
        "optimizer.clip_value is -1.0; it must be above 0, or None for no clipping",
    ),
    ({"optimizer__weight_decay": -0.1}, "optimizer.weight_decay is -0.1; it must be at least 0"),
    ({"data__train": ()}, "data.train names no source; give a path, or `embedded`"),
    (
        {"data__weights": (1.0, 2.0)},
        "data.weights has 2 numbers for 1 sources in data.train; give one each",
    ),
    ({"data__weights": (0.0,)}, "data.weights (0.0,) must all be above 0; leave a source out instead"),
    (
        {"data__validation_fraction": 1.0},
        "data.validation_fraction is 1.0; it must be between 0 and 1, or name data.validation sources",
    ),
    ({"evaluation__every": -1}, "evaluation.every is -1; it must be at least 0"),
    ({"evaluation__windows": -1}, "evaluation.windows is -1; it must be at least 0"),
    ({"checkpoint__every": -1}, "checkpoint.every is -1; it must be at least 0"),
    ({"log__every": 0}, "log.every is 0; it must be at least 1"),
    ({"checkpoint__keep": 0}, "checkpoint.keep is 0; it must be at least 1"),
    ({"data__prefetch": 0}, "data.prefetch is 0; it must be at least 1"),
    (
        {"mesh__data": -1, "mesh__fsdp": -1},
        "mesh {'data': -1, 'fsdp': -1, 'tensor': 1, 'context': 1, 'expert': 1, 'stage': 1} must hold numbers of at least 1, and -1 at most once",
    ),
    ({"objective": CLM(label_smoothing=1.0)}, "objective.label_smoothing is 1.0; it must be in [0, 1)"),
    ({"objective": CLM(z_loss=-1e-4)}, "objective.z_loss is -0.0001; it must be at least 0"),
]


@pytest.mark.parametrize(("changes", "sentence"), SENTENCES, ids=[" ".join(changes) for changes, _ in SENTENCES])
def test_validate_says(changes, sentence):
    with pytest.raises(UserError) as error:
        validate(run_with(**changes))
    assert str(error.value) == sentence
    assert error.value.exit_status == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model__position": "rope", "batch__length": 2048},  # rotary positions have no table to outgrow
        {"model__head_dim": 64, "model__model_dim": 100},  # width and heads are apart then
        {"data__validation": ("x.txt",), "data__validation_fraction": 0.0},  # nothing is split off
        {"steps": 10, "optimizer__schedule__unit": "tokens"},  # 10 steps are 81,920 tokens: a warmup of 100 fits
        {"optimizer__clip_norm": None},
        {"mesh__data": 1},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_validate_lets_pass(changes):
    assert validate(run_with(**changes)) is None
