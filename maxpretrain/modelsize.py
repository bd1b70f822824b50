"""Sizes that follow from a shape by arithmetic. Nothing here imports numpy or jax."""

from __future__ import annotations

from maxpretrain.modelconfig import ModelConfig


def attention_matrices(model: ModelConfig) -> int:
    """Elements of the projections of one attention sublayer."""
    d, h = model.model_dim, model.num_heads
    if not model.latent.kv_rank:
        return 2 * d * (h + model.kv_heads) * model.head_width
    latent = model.latent
    query = h * (latent.nope_dim + latent.rope_dim)
    queries = d * query if latent.q_rank is None else latent.q_rank * (d + query)
    keys = d * (latent.kv_rank + latent.rope_dim) + latent.kv_rank * h * (latent.nope_dim + latent.value_dim)
    return queries + keys + h * latent.value_dim * d


def mlp_matrices(model: ModelConfig, layer: int, *, active: bool) -> int:
    """Elements of the matrices of a layer's MLP.

    Args:
        active: of a mixture of experts only those that one token goes through.
    """
    products, moe = (3 if model.gated else 2) * model.model_dim, model.moe
    if not moe.num_experts or layer in moe.dense_layers:
        return products * model.mlp_width
    experts = moe.top_k if active else moe.num_experts
    return products * (experts * model.expert_width + moe.shared_dim) + model.model_dim * moe.num_experts * (
        1 + moe.noisy
    )


def stack_matrices(model: ModelConfig, *, active: bool = True, decoder: bool = False) -> int:
    """Elements of the matrices that a token goes through in all layers.

    Args:
        active: count a matrix for each layer that it serves, and of experts those of one token; False: count what is stored.
        decoder: of the decoder of an encoder-decoder.
    """
    layers = model.decoder_layers if decoder else model.num_layers
    if not active and model.layer_groups:
        layers = model.layer_groups
    attention = attention_matrices(model) * (2 if decoder else 1)
    return sum(attention + mlp_matrices(model, i, active=active) for i in range(layers))


def memory_matrices(model: ModelConfig) -> int:
    """Elements of the projections of an encoder's states to keys and values, in one layer of the decoder."""
    return 2 * model.model_dim * model.kv_heads * model.head_width


def head_matrices(model: ModelConfig, vocab_size: int) -> int:
    """Elements of what stands between the last hidden state and the vocabulary, and between the embedding and the first."""
    between = model.model_dim * model.embed_width
    projected = 0 if model.embed_dim is None else between
    return projected + (between if model.lm_transform else 0) + vocab_size * model.embed_width


def seen_keys(model: ModelConfig, layer: int, length: int, *, causal: bool) -> float:
    """Keys that a query sees in a layer, on average over a sequence.

    Args:
        causal: count what a causal mask leaves; a network without one has all either way.
    """
    window = model.window if model.is_local(layer) else None
    if model.architecture == "encoder":
        return float(length if window is None else min(length, 2 * window + 1))
    if not causal:
        return float(length if window is None else min(length, window))
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)
