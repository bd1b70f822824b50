"""FLOPs per token of published shapes, and the peak of every device kind that JAX reports."""

import dataclasses
import math
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from maxpretrain.config import ModelConfig
from maxpretrain.models import build
from maxpretrain.monitor import flops
from maxpretrain.objectives import CLM

GPT2 = ModelConfig(vocab_size=50_257, num_layers=12, model_dim=768, num_heads=12)
QWEN = ModelConfig(
    vocab_size=151_936,
    num_layers=28,
    model_dim=1536,
    num_heads=12,
    num_kv_heads=2,
    mlp_dim=8960,
    gated=True,
    position="rope",
)
LLAMA_70B = ModelConfig(
    vocab_size=128_256,
    num_layers=80,
    model_dim=8192,
    num_heads=64,
    num_kv_heads=8,
    mlp_dim=28_672,
    gated=True,
    tie_embeddings=False,
)


def test_matrix_parameters():
    # GPT-2: 12 layers of 12·768², and the tied unembedding 50257·768; its 124,439,808 less positions, norms and biases
    assert flops.matmul_parameters(GPT2) == 123_532_032
    # Qwen2.5-1.5B: 28·(2·1536² + 2·1536·256 + 3·1536·8960) + 151936·1536
    assert flops.matmul_parameters(QWEN) == 1_543_569_408
    # Llama-3-70B has 70,553,706,496, of which 161·8192 in norms and 128256·8192 in the embedding
    assert flops.matmul_parameters(LLAMA_70B) == 69_501_714_432


@pytest.mark.parametrize("config", [GPT2, QWEN, dataclasses.replace(QWEN, head_dim=32, tie_embeddings=False)])
def test_matrix_parameters_are_those_the_model_declares(config):
    specs = jax.tree.leaves(build(config).abstract, is_leaf=lambda x: hasattr(x, "role"))
    matrices = sum(math.prod(spec.shape) for spec in specs if spec.role == "matrix")
    # untied, the unembedding is a matrix of its own; tied, the embedding stands for it
    assert flops.matmul_parameters(config) == matrices + config.tie_embeddings * config.vocab_size * config.model_dim


def test_flops_per_token_under_both_conventions():
    # 6·123,532,032 + 12·12·768·1024, and half of the latter
    assert flops.flops_per_token(GPT2, 1024, causal=False) == 854_438_400
    assert flops.flops_per_token(GPT2, 1024, causal=True) == 797_815_296
    assert flops.flops_per_token(QWEN, 1024, causal=False) == 9_789_898_752
    assert flops.flops_per_token(QWEN, 1024, causal=True) == 9_525_657_600


def test_reproduces_a_published_mfu():
    # llm.q: Qwen2.5-1.5B at T=1024, 58.9k tokens/s on an H100 SXM, 56.7 % causal
    mfu = (
        58_900 * flops.flops_per_token(QWEN, 1024, causal=True) / flops.find_accelerator("NVIDIA H100 80GB HBM3").flops
    )
    assert mfu == pytest.approx(0.567, abs=5e-4)


def test_head_width_apart_from_the_model_width():
    wide = ModelConfig(
        vocab_size=10, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=4, gated=False
    )
    assert flops.matmul_parameters(wide) == 8 * 32 + 2 * 8 * 16 + 32 * 8 + 2 * 8 * 4 + 10 * 8
    assert (
        flops.flops_per_token(wide, 100, causal=False) - flops.flops_per_token(wide, 100, causal=True)
        == 6 * 2 * 16 * 100
    )


def test_no_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="vocab_size is None"):
        flops.flops_per_token(ModelConfig(), 128, causal=True)


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v2", 22.5),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("AMD Instinct MI300X", 1307.4),
        ("h200", 989.5),
        ("h100", 989.5),
        ("a100", 312),
        ("v5p", 459),
        ("v5litepod", 197),
        ("tpu7x", 1153.5),
    ],
)
def test_table(kind, teraflops):
    peak, source = flops.peak_flops(SimpleNamespace(platform="tpu" if "TPU" in kind else "gpu", device_kind=kind))
    assert peak == teraflops * 1e12
    assert "dense" in source
    assert "measured" not in source


@pytest.mark.parametrize(
    "kind",
    [
        "TPU v4 lite",
        "TPU v9",
        "v5",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A1000",
        "NVIDIA L400",
        "NVIDIA GeForce GTX 1080",
        "cpu",
        "",
    ],
)
def test_a_kind_that_only_looks_like_another_is_unknown(kind):
    assert flops.find_accelerator(kind) is None


def test_memory_of_the_forty_gigabyte_card():
    assert flops.find_accelerator("NVIDIA A100-SXM4-40GB").memory == 39
    assert flops.find_accelerator("NVIDIA A100-SXM4-80GB").memory == 79


def test_cpu_is_measured_once_and_labelled():
    device = jax.local_devices(backend="cpu")[0]
    first, source = flops.peak_flops(device)
    assert source.startswith("measured matmul peak (float32")
    assert 1e9 / jax.local_device_count("cpu") < first < 1e14
    start = time.perf_counter()
    second, _ = flops.peak_flops(device)
    assert time.perf_counter() - start < 0.05
    assert second == first


def test_a_cpu_split_into_devices_is_measured_whole_and_divided(monkeypatch):
    device = jax.local_devices(backend="cpu")[0]
    monkeypatch.setattr(flops, "_measured_matmul", lambda _: 8e9)
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device] * 4)
    peak, source = flops.peak_flops(device)
    np.testing.assert_equal(peak, 2e9)
    assert source == "measured matmul peak (float32, 1/4 of the CPU)"


def test_unknown_accelerator_is_measured_and_labelled(monkeypatch):
    monkeypatch.setattr(flops, "_measured_matmul", lambda _: 5e12)
    peak, source = flops.peak_flops(SimpleNamespace(platform="gpu", device_kind="NVIDIA X1"))
    assert peak == 5e12
    assert source == "measured matmul peak (bf16, NVIDIA X1)"


def test_what_not_every_token_goes_through_counts_by_its_share():
    encoder = ModelConfig(
        architecture="encoder", vocab_size=100, num_layers=1, model_dim=8, num_heads=2, mlp_dim=16, heads=("lm",)
    )
    # 4·8² of attention and 2·8·16 of the MLP, 8·100 of the head at 3 of 20 places, 12·D·T of attention.
    assert flops.flops_per_token(encoder, 20, True, predictions=3) == 6 * 512 + 6 * 800 * 3 / 20 + 12 * 8 * 20
    both = dataclasses.replace(encoder, architecture="encoder-decoder")
    # A decoder's block has 4·8² more, of which 2·8² are for the encoder's tokens.
    products = 20 * 512 + 5 * (768 - 128) + 20 * 128 + 5 * 800
    pairs = 20 * 20 + 5 * (5 + 20)
    assert flops.flops_per_token(both, 20, False, decoder_length=5) == (6 * products + 12 * 8 * pairs) / 20
    run = CLM()
    assert flops.training_flops(run, GPT2, 1024, True) == 797_815_296
