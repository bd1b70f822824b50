"""What benchmarks take for granted of the library."""

import importlib.util
import sys
from pathlib import Path

import numpy as np

from maxpretrain.config import ModelConfig
from maxpretrain.fingerprint import named_leaves
from maxpretrain.models import build

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_step_against_pytorch_finds_our_parameters(monkeypatch):
    spec = importlib.util.spec_from_file_location("cpu_step", BENCHMARKS / "cpu_step.py")
    cpu_step = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "cpu_step", cpu_step)  # dataclasses look their module up
    spec.loader.exec_module(cpu_step)
    model = build(ModelConfig(vocab_size=65, num_layers=3, model_dim=32, num_heads=4, max_length=16, bias=False))
    ours = {name.replace("/", "."): np.zeros(s.shape, np.float32) for name, s in named_leaves(model.abstract).items()}
    named = cpu_step.in_torch(ours)
    assert sum(array.size for array in named.values()) == model.num_parameters
    assert named["blocks.2.qkv.weight"].shape == (96, 32)
