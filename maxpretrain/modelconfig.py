"""The shape of a network, as plain values. Nothing here imports numpy or jax.

Every option is general and named for what it does; which published family uses which is said in `models/families/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maxpretrain.errors import UserError, nearest

Activation = Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu", "tanh"]
HEADS = ("lm", "pooler", "pair", "replaced", "span_boundary", "sequence", "token", "value")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) and how they are stretched beyond the length of training."""

    theta: float = 10_000.0  # base of the frequencies
    local_theta: float | None = None  # of layers with a window, unscaled; None: as all others
    fraction: float = 1.0  # share of a head's width that turns, from the front
    layout: Literal["half", "interleaved"] = "half"  # pairs (i, i+K/2), or (2i, 2i+1)
    scaling: Literal["none", "linear", "ntk", "dynamic", "yarn", "llama3"] = "none"  # stretching rule
    factor: float = 1.0  # by how much the length is stretched
    original_length: int | None = None  # trained before stretching (dynamic, yarn, llama3)
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original_length / this are stretched fully
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original_length / this are left alone
    beta_fast: float = 32.0  # yarn: turns within original_length above which a frequency is left alone
    beta_slow: float = 1.0  # yarn: turns below which it is stretched fully
    attention_factor: float | None = None  # yarn: multiplies cosines and sines; None: 0.1·ln(factor) + 1
    mscale: float | None = None  # yarn as DeepSeek has it: attention_factor from the ratio of two such terms
    mscale_all_dim: float | None = None  # the other one
    truncate: bool = True  # yarn: the ramp between the two betas begins and ends at whole dimensions


@dataclass(frozen=True, kw_only=True)
class RelativeConfig:
    """Positions as a function of the distance between query and key: T5's bias and DeBERTa's disentangled attention."""

    buckets: int = 32  # of distances; disentangled: so many on each side of zero, 0: one a distance
    max_distance: int = 128  # beyond it all distances share a bucket
    per_layer: bool = False  # t5: a table in every layer (UMT5) instead of one for all
    terms: tuple[str, ...] = ("c2p", "p2c")  # disentangled: content to position, position to content
    share_projections: bool = True  # disentangled: position queries and keys by the content's projections
    norm: bool = True  # disentangled: LayerNorm on the table
    absolute: bool = False  # disentangled: a learned table of positions is added to the input as well


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, §2.1). Off while kv_rank is 0."""

    kv_rank: int = 0  # width of the latent that keys and values are made from
    q_rank: int | None = None  # width of the latent that queries are made from; None: straight from the hidden state
    nope_dim: int = 128  # width of a head's queries and keys without position
    rope_dim: int = 64  # width of what turns; the key's is shared by all heads
    value_dim: int = 128  # width of a head's values


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in place of the MLP. Off while num_experts is 0."""

    num_experts: int = 0  # experts a layer
    top_k: int = 2  # experts a token goes to
    expert_dim: int | None = None  # hidden width of an expert; None: that of the MLP
    shared_dim: int = 0  # hidden width of an MLP that every token goes through beside its experts; 0: none
    dense_layers: tuple[int, ...] = ()  # numbers of layers that keep the plain MLP
    router: Literal["softmax", "sigmoid"] = "softmax"  # scores of the experts
    renormalize: bool = True  # weights of the chosen experts add up to 1
    scale: float = 1.0  # multiplies the weights
    groups: int = 1  # experts are chosen within the best `top_groups` of so many groups
    top_groups: int = 1  # of `groups`
    balance_bias: bool = False  # a bias for each expert in the choice, not in the weights (DeepSeek-V3)
    noisy: bool = False  # noise of a learned size on the router's logits in training (Shazeer)
    capacity: float | None = None  # places of an expert, as a factor of an even share; None: dropless


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A network's shape. Presets by published size are in `maxpretrain.models.families`."""

    architecture: Literal["decoder", "encoder", "encoder-decoder"] = "decoder"  # the network
    vocab_size: int | None = None  # rows of the embedding; None: as many as the tokenizer has
    num_layers: int = 12  # transformer blocks (of the encoder, where there are two stacks)
    num_decoder_layers: int | None = None  # blocks of the decoder of an encoder-decoder; None: num_layers
    model_dim: int = 768  # width of the residual stream
    num_heads: int = 12  # query heads
    num_kv_heads: int | None = None  # key-value heads; None: as many as query heads; 1: multi-query
    head_dim: int | None = None  # width of a head; None: model_dim / num_heads
    mlp_dim: int | None = None  # hidden width of the MLP; None: 4 × model_dim
    max_length: int = 1024  # longest sequence: positions of a learned table
    # the input
    embed_dim: int | None = None  # width of the embedding, projected to model_dim; None: model_dim, no projection
    embed_scale: bool | None = None  # embedding × √model_dim; None: with sinusoidal positions only
    embed_norm: bool = False  # a norm on what goes into the first layer
    token_types: int = 0  # kinds of segment with an embedding of their own; 0: none
    position: Literal["learned", "rope", "sinusoidal", "alibi", "t5", "disentangled", "none"] = (
        "learned"  # how positions enter
    )
    position_offset: int = 0  # row of the learned table that position 0 has
    rope: RopeConfig = RopeConfig()
    relative: RelativeConfig = RelativeConfig()
    # norms
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_offset"] = "layernorm"  # rmsnorm_offset multiplies by 1 + scale
    norm_eps: float = 1e-5  # added to the variance
    # of a sublayer f: pre x + f(n(x)), post n(x + f(x)), sandwich x + n(f(n(x))), output x + n(f(x))
    norm_placement: Literal["pre", "post", "sandwich", "output"] = "pre"  # where a sublayer's norms are
    norm_bias: bool | None = None  # biases of LayerNorm; None: as `bias`
    first_norm: bool = True  # a norm before the first layer's attention, where others have one
    parallel: Literal["none", "two_norms", "one_norm"] = "none"  # x + attention(n(x)) + mlp(n(x))
    # attention
    attention_scale: float | None = None  # multiplies q·k; None: 1/√head_dim
    attention_softcap: float | None = None  # scores become c·tanh(scores/c); None: as they are
    qk_norm: Literal["none", "head", "projection"] = "none"  # of queries and keys: over a head, or all heads at once
    window: int | None = None  # tokens seen in local layers, one's own too (encoder: so many on either side)
    layer_pattern: tuple[str, ...] = ()  # "local", "global", repeated; empty: all local where there is a window
    latent: LatentConfig = LatentConfig()
    # MLP
    activation: Activation = "gelu_tanh"  # "gelu" is the erf form
    gated: bool = False  # MLP of act(x·gate)·(x·up): SwiGLU with silu, GeGLU with gelu
    moe: MoEConfig = MoEConfig()
    # biases
    bias: bool = True  # biases in linear layers and LayerNorm
    qkv_bias: bool | None = None  # of the query, key and value projections; None: as `bias`
    out_bias: bool | None = None  # of the attention's output projection; None: as `bias`
    mlp_bias: bool | None = None  # of the MLP; None: as `bias`
    # the output
    layer_groups: int | None = None  # layers share parameters in so many groups (ALBERT: 1); None: each has its own
    mask_decoder: bool = False  # the last layer runs twice over its input, queries knowing absolute positions (DeBERTa)
    # of lm, pooler, pair, replaced, span_boundary, sequence, token, value
    heads: tuple[str, ...] = ("lm",)  # what reads the hidden states
    num_labels: int = 2  # classes of the sequence and token heads
    pooling: Literal["end", "mean"] = (
        "end"  # pooler, sequence: the first token of an encoder, the last of others; or all
    )
    pooler_activation: Activation = "tanh"  # of the pooler
    head_transform: bool = False  # the sequence and token heads begin with linear, activation, norm (ModernBERT)
    tie_embeddings: bool = True  # unembed with the embedding table
    lm_transform: bool = False  # the lm head begins with linear, activation, norm (BERT)
    lm_activation: Activation | None = None  # of that; None: as `activation`
    lm_bias: bool = False  # a bias for each token of the vocabulary
    logit_scale: float = 1.0  # multiplies the logits
    logit_softcap: float | None = None  # logits become c·tanh(logits/c); None: as they are
    decoder_start_id: int | None = None  # token that the decoder of an encoder-decoder begins with
    # training
    dropout: float = 0.0  # rate on embeddings, attention weights and residual branches
    init: Literal["normal", "truncated_normal", "xavier_uniform", "he_normal", "lecun_normal", "t5"] = (
        "normal"  # of matrices
    )
    init_std: float = 0.02  # standard deviation of (truncated) normal initialization, and of embeddings
    depth_scaled_init: bool = True  # residual output projections scaled by 1/√(2·num_layers), as in GPT-2
    mup_base: int | None = None  # model_dim at which the learning rate was tuned (muP); None: no muP
    mup_base_head: int | None = None  # head width there; None: as here, with fewer heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.model_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        return 4 * self.model_dim if self.mlp_dim is None else self.mlp_dim

    @property
    def expert_width(self) -> int:
        return self.mlp_width if self.moe.expert_dim is None else self.moe.expert_dim

    @property
    def embed_width(self) -> int:
        return self.model_dim if self.embed_dim is None else self.embed_dim

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def has_position_table(self) -> bool:
        """Whether a learned vector for each position is added to the input, which ends at max_length."""
        return self.position == "learned" or (self.position == "disentangled" and self.relative.absolute)

    @property
    def is_bounded(self) -> bool:
        """Whether positions end at max_length: those of a table, and those that were not trained beyond."""
        return self.has_position_table or self.position == "sinusoidal" or self.mask_decoder

    @property
    def final_norm(self) -> bool:
        """Whether a norm follows the last layer: where the residual stream itself is not normalized."""
        return self.norm_placement != "post"

    @property
    def mup_ratio(self) -> float:
        """Width of the tuned model by that of this one; 1 without muP."""
        return 1.0 if self.mup_base is None else self.mup_base / self.model_dim

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees through the window."""
        if self.window is None:
            return False
        pattern = self.layer_pattern or ("local",)
        return pattern[layer % len(pattern)] == "local"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def validate_model(model: ModelConfig, length: int) -> None:
    """Checks a shape by itself.

    Args:
        length: of the sequences it is to serve.

    Raises:
        UserError: one sentence that names the field, its value and what would do.
    """
    _validate_sizes(model)
    _validate_attention(model)
    _validate_experts(model)
    if model.is_bounded:
        require(
            length <= model.max_length,
            f"batch.length {length} is longer than model.max_length {model.max_length}; raise model.max_length or shorten batch.length",
        )
    require(0.0 <= model.dropout < 1.0, f"model.dropout is {model.dropout}; it must be in [0, 1)")
    for head in model.heads:
        require(head in HEADS, f'model.heads has "{head}"{nearest(head, HEADS)}; there are {", ".join(HEADS)}')
    require(
        "pair" not in model.heads or "pooler" in model.heads,
        'model.heads has "pair" without "pooler", which it reads; add "pooler"',
    )
    _validate_combinations(model)
    encoder = model.architecture == "encoder"
    require(
        not model.lm_transform or encoder or "lm" in model.heads,
        'model.lm_transform needs "lm" in model.heads',
    )


def _validate_combinations(model: ModelConfig) -> None:
    """Options that are each possible, and not together."""
    for wrong, what in (
        (
            model.architecture == "encoder-decoder" and model.parallel != "none",
            'model.parallel with an encoder-decoder: a parallel block has no attention to the encoder; use "none"',
        ),
        (
            model.architecture != "encoder" and model.position == "disentangled",
            "model.position disentangled is for encoders; use rope, t5 or alibi",
        ),
        (
            not model.first_norm and model.norm_placement not in ("pre", "sandwich"),
            f'model.first_norm False is for norms before a sublayer, not for model.norm_placement "{model.norm_placement}"',
        ),
        (
            model.layer_groups is not None and bool(model.moe.num_experts or not model.first_norm),
            "model.layer_groups needs layers that are all alike: no experts, and model.first_norm True",
        ),
        (
            model.mask_decoder
            and (model.architecture != "encoder" or model.latent.kv_rank > 0 or model.moe.num_experts > 0),
            "model.mask_decoder is for encoders without latent attention and experts; leave it off",
        ),
        (
            "span_boundary" in model.heads and model.embed_width != model.model_dim,
            'model.heads has "span_boundary", which needs model.embed_dim equal to model.model_dim',
        ),
        (
            model.head_transform and model.embed_width != model.model_dim,
            "model.head_transform needs model.embed_dim equal to model.model_dim",
        ),
        (
            model.mup_base is not None
            and (
                model.latent.kv_rank > 0
                or model.position == "disentangled"
                or model.embed_dim is not None
                or model.init == "t5"
            ),
            "model.mup_base does not go with latent attention, disentangled positions, model.embed_dim or init t5",
        ),
    ):
        require(not wrong, what)


def _validate_sizes(model: ModelConfig) -> None:
    for part in ("num_layers", "model_dim", "num_heads", "max_length"):
        require(getattr(model, part) >= 1, f"model.{part} is {getattr(model, part)}; it must be at least 1")
    optional = (
        "num_kv_heads",
        "head_dim",
        "mlp_dim",
        "embed_dim",
        "num_decoder_layers",
        "window",
        "layer_groups",
        "mup_base",
        "mup_base_head",
    )
    for part in optional:
        value = getattr(model, part)
        require(value is None or value >= 1, f"model.{part} is {value}; it must be at least 1, or None")
    for part, value in (
        ("norm_eps", model.norm_eps),
        ("init_std", model.init_std),
        ("rope.theta", model.rope.theta),
        ("rope.factor", model.rope.factor),
    ):
        require(value > 0, f"model.{part} is {value}; it must be above 0")
    require(model.position_offset >= 0, f"model.position_offset is {model.position_offset}; it must be at least 0")
    if model.vocab_size is not None:
        require(model.vocab_size >= 2, f"model.vocab_size is {model.vocab_size}; it must be at least 2")
    if model.layer_groups is not None:
        require(
            model.num_layers % model.layer_groups == 0,
            f"model.num_layers {model.num_layers} is not divisible by model.layer_groups {model.layer_groups}",
        )


def _validate_attention(model: ModelConfig) -> None:
    heads, kv, width = model.num_heads, model.kv_heads, model.model_dim
    if model.head_dim is None and not model.latent.kv_rank:
        require(
            width % heads == 0,
            f"model.model_dim {width} is not divisible by model.num_heads {heads}; use {width // heads * heads or heads}"
            f" or {(width // heads + 1) * heads}, or set model.head_dim",
        )
    require(
        heads % kv == 0,
        f"model.num_heads {heads} is not divisible by model.num_kv_heads {kv}; use "
        + " or ".join(str(n) for n in range(1, heads + 1) if heads % n == 0),
    )
    if model.position == "rope" and not model.latent.kv_rank:
        require(
            model.head_width % 2 == 0, f"rotary positions need an even head width; model.head_dim is {model.head_width}"
        )
    for kind in model.layer_pattern:
        require(kind in ("local", "global"), f'model.layer_pattern has "{kind}"; it takes "local" and "global"')
    require(
        not model.layer_pattern or model.window is not None,
        "model.layer_pattern is set and model.window is not; set model.window, which local layers see through",
    )
    rope = model.rope
    require(0 < rope.fraction <= 1, f"model.rope.fraction is {rope.fraction}; it must be in (0, 1]")
    if rope.scaling in ("yarn", "llama3", "dynamic"):
        require(
            rope.original_length is not None,
            f'model.rope.scaling "{rope.scaling}" needs model.rope.original_length, the length before stretching',
        )
    if rope.scaling == "llama3":
        require(
            rope.high_frequency_factor > rope.low_frequency_factor,
            f"model.rope.high_frequency_factor {rope.high_frequency_factor} must be above model.rope.low_frequency_factor "
            f"{rope.low_frequency_factor}",
        )
    if model.position == "disentangled":
        require(heads == kv, f"disentangled positions need model.num_kv_heads {kv} equal to model.num_heads {heads}")
        require(bool(model.relative.terms), "disentangled positions need a term in model.relative.terms")
    for term in model.relative.terms:
        require(term in ("c2p", "p2c"), f'model.relative.terms has "{term}"; it takes "c2p" and "p2c"')
    if model.latent.kv_rank:
        require(model.position == "rope", "latent attention needs model.position rope")
        require(model.latent.rope_dim >= 2, f"model.latent.rope_dim is {model.latent.rope_dim}; it must be at least 2")
        require(model.latent.rope_dim % 2 == 0, f"model.latent.rope_dim is {model.latent.rope_dim}; it must be even")


def _validate_experts(model: ModelConfig) -> None:
    moe = model.moe
    if not moe.num_experts:
        return
    require(moe.groups >= 1, f"model.moe.groups is {moe.groups}; it must be at least 1")
    require(
        1 <= moe.top_k <= moe.num_experts,
        f"model.moe.top_k is {moe.top_k}; it must be from 1 to model.moe.num_experts {moe.num_experts}",
    )
    require(
        moe.num_experts % moe.groups == 0 and 1 <= moe.top_groups <= moe.groups,
        f"model.moe.groups {moe.groups} must divide model.moe.num_experts {moe.num_experts}, and model.moe.top_groups "
        f"{moe.top_groups} be at most that",
    )
    in_groups = moe.num_experts // moe.groups * moe.top_groups
    require(
        moe.top_k <= in_groups,
        f"model.moe.top_k {moe.top_k} is more than the {in_groups} experts of model.moe.top_groups {moe.top_groups} groups",
    )
    require(
        all(0 <= n < model.num_layers for n in moe.dense_layers),
        f"model.moe.dense_layers {moe.dense_layers} must be numbers from 0 to {model.num_layers - 1}",
    )
    require(moe.capacity is None or moe.capacity > 0, f"model.moe.capacity is {moe.capacity}; it must be above 0")
