"""Qwen2.5. Reference: Qwen Team 2024, arXiv:2412.15115, table 1."""

from __future__ import annotations

from maxpretrain.config import ModelConfig


def _size(
    layers: int, dim: int, heads: int, kv_heads: int, mlp: int, *, vocab: int, tied: bool, length: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        max_length=length,
        position="rope",
        rope_theta=1e6,
        norm="rmsnorm",
        norm_eps=1e-6,
        activation="silu",
        gated=True,
        bias=False,
        qkv_bias=True,
        tie_embeddings=tied,
        init="normal",
        init_std=0.02,
        depth_scaled_init=False,
    )


PRESETS = {
    "qwen2.5-0.5b": _size(24, 896, 14, 2, 4864, vocab=151_936, tied=True, length=32_768),
    "qwen2.5-1.5b": _size(28, 1536, 12, 2, 8960, vocab=151_936, tied=True, length=131_072),
    "qwen2.5-7b": _size(28, 3584, 28, 4, 18_944, vocab=152_064, tied=False, length=131_072),
}
