"""What the families with experts have in common: names of layers with a plain MLP and of layers with experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maxpretrain.config import ModelConfig
from maxpretrain.errors import UserError
from maxpretrain.models.families import gated
from maxpretrain.models.families.naming import Name, linear, name

PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
Attention = Callable[[ModelConfig, str, str], list[Name]]


def mixture(model: ModelConfig, theirs: str, ours: str, parts: Mapping[str, str]) -> list[Name]:
    """Router, experts one by one, and the shared MLP."""
    names = linear(f"{theirs}.gate", f"{ours}/router", bias=False)
    if model.moe.balance_bias:
        names.append(name(f"{theirs}.gate.e_score_correction_bias", f"{ours}/balance_bias"))
    for part, their_part in parts.items():
        names += linear(f"{theirs}.experts.{{expert}}.{their_part}", f"{ours}/experts/{part}", bias=False)
    return names + (gated.mlp(f"{theirs}.shared_experts", f"{ours}/shared") if model.moe.shared_dim else [])


def names(
    model: ModelConfig,
    *,
    mlp: str = "mlp",
    parts: Mapping[str, str] = PARTS,
    attention: Attention = gated.attention,
) -> list[Name]:
    """All tensors of a decoder.

    Args:
        mlp: their name of a layer's experts with router.
        parts: our names of an expert's matrices -> theirs.
        attention: names of the attention of one kind of layer, from its name there and ours.
    """
    layer, dense = "model.layers.{layer}", len(dense_layers(model))
    kinds = {"block": dense > 0, "experts": dense < model.num_layers}
    found = gated.outside(model)
    for kind in (kind for kind, there in kinds.items() if there):
        ours = f"decoder/stack/{kind}"
        found += gated.norms(model, layer, ours)
        found += attention(model, f"{layer}.self_attn", f"{ours}/attention")
        if kind == "experts":
            found += mixture(model, f"{layer}.{mlp}", f"{ours}/mlp", parts)
        else:
            found += gated.mlp(f"{layer}.mlp", f"{ours}/mlp")
    return found


def dense_layers(model: ModelConfig) -> list[int]:
    """Numbers of the layers with a plain MLP."""
    return [i for i in range(model.num_layers) if not model.moe.num_experts or i in model.moe.dense_layers]


def require_everywhere(model: ModelConfig, family: str) -> None:
    """
    Raises:
        UserError: a layer has a plain MLP, which this family's classes have nowhere.
    """
    dense = dense_layers(model)
    if dense:
        raise UserError(f"layer {dense[0]} of this model has no experts, and every layer of {family} has some")
