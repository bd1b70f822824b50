"""PaLM: attention and MLP side by side on one norm, multi-query. No library has its parameters; presets only.

Reference: Chowdhery et al. 2022, arXiv:2204.02311, §2, table 1, and §5 on the initial values.
"""

from __future__ import annotations

import math

from maxpretrain.config import ModelConfig, RopeConfig


def _size(layers: int, dim: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=256_000,
        num_layers=layers,
        model_dim=dim,
        num_heads=heads,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=4 * dim,
        max_length=2048,
        position="rope",
        rope=RopeConfig(theta=1e4),
        norm="layernorm",
        norm_eps=1e-6,
        parallel="one_norm",
        activation="silu",
        gated=True,
        bias=False,
        tie_embeddings=True,
        # Embeddings of unit size serve as the unembedding.
        logit_scale=1 / math.sqrt(dim),
        init="lecun_normal",
        init_std=1.0,
        depth_scaled_init=False,
    )


PRESETS = {
    "palm-8b": _size(32, 4096, 16),
    "palm-62b": _size(64, 8192, 32),
    "palm-540b": _size(118, 18_432, 48),
}
