"""GPT-2. Reference: Radford et al. 2019, Language Models are Unsupervised Multitask Learners."""

from __future__ import annotations

from maxpretrain.config import ModelConfig


def _size(layers: int, dim: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=50_257,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        max_length=1024,
        position="learned",
        norm="layernorm",
        norm_eps=1e-5,
        activation="gelu_tanh",
        bias=True,
        tie_embeddings=True,
        init="normal",
        init_std=0.02,
        depth_scaled_init=True,
    )


PRESETS = {
    "gpt2": _size(12, 768, 12),
    "gpt2-medium": _size(24, 1024, 16),
    "gpt2-large": _size(36, 1280, 20),
    "gpt2-xl": _size(48, 1600, 25),
}
