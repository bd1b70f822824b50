"""A published config.json, read key by key, with a sentence for what is not supported."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import ModelConfig, RopeConfig
from maxpretrain.errors import UserError

_REQUIRED: Any = object()

# Their names of activations -> ours. "gelu" is the erf form in both.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
THEIR_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "squared_relu": "relu2",
    "silu": "silu",
    "tanh": "tanh",
}


class Options:
    """The keys of a config.json; a key that is null counts as absent.

    Args:
        raw: as parsed.
        where: the file, for errors.
    """

    def __init__(self, raw: dict[str, Any], where: str = "config.json"):
        self.raw, self.where = raw, where

    def get(self, *keys: str, default: Any = _REQUIRED) -> Any:
        """The value of the first of `keys` that is there; `default` where none is.

        Raises:
            UserError: none is there and there is no default.
        """
        for key in keys:
            if self.raw.get(key) is not None:
                return self.raw[key]
        if default is _REQUIRED:
            raise UserError(f"{self.where} has no {keys[0]}; take the file that belongs to the weights")
        return default

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses an option that changes the network in a way we do not build. Absent counts as the first of `allowed`.

        Raises:
            UserError: the value is another.
        """
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            shown = " or ".join(str(a) for a in allowed if a is not None) or "its absence"
            raise UserError(f"{self.where}: {key} is {value!r}, and only {shown} is supported for {self.model_type}")

    @property
    def model_type(self) -> str:
        return str(self.raw.get("model_type", "this model"))

    @property
    def classes(self) -> list[str]:
        return list(self.raw.get("architectures") or [])

    def activation(self, *keys: str, default: str = _REQUIRED) -> str:
        """Our name of the activation under one of `keys`.

        Raises:
            UserError: it is one we do not have.
        """
        theirs = self.get(*keys, default=default)
        if theirs not in ACTIVATIONS:
            raise UserError(f'{self.where}: {keys[0]} is "{theirs}", and supported are {", ".join(ACTIVATIONS)}')
        return ACTIVATIONS[theirs]

    def dropout(self, *keys: str) -> float:
        """The rate that all of ours have; the largest of theirs."""
        return max([float(self.raw.get(key) or 0.0) for key in keys], default=0.0)

    def rope(self, *, theta: float = 10_000.0, fraction: float = 1.0, layout: str = "half") -> RopeConfig:
        """Rotary positions, in the spelling of any version.

        Args:
            theta, fraction: where the file gives none.

        Raises:
            UserError: a kind of scaling that we do not have.
        """
        new, old = dict(self.raw.get("rope_parameters") or {}), dict(self.raw.get("rope_scaling") or {})
        local_theta = self.raw.get("rope_local_base_freq")
        if "full_attention" in new or "sliding_attention" in new:  # by kind of layer
            local = new.get("sliding_attention") or {}
            if (local.get("rope_type") or "default") != "default":
                raise UserError(f"{self.where}: rope_parameters of sliding layers are scaled, which is not supported")
            local_theta, new = local.get("rope_theta"), dict(new.get("full_attention") or {})
        scaling = {**new, **old}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in _SCALINGS:
            raise UserError(f'{self.where}: rope_type is "{kind}", and supported are {", ".join(_SCALINGS)}')
        longest = self.get("max_position_embeddings", default=None)
        values = {ours: scaling[theirs] for theirs, ours in _ROPE_FIELDS.items() if scaling.get(theirs) is not None}
        if kind in (
            "yarn",
            "llama3",
        ):  # the file's own key wins over the one beside the factor: so the reference reads it
            own = self.get("original_max_position_embeddings", default=None)
            values["original_length"] = own or values.get("original_length") or longest
        if kind == "dynamic":
            values["original_length"] = longest  # likewise, whatever else it says
        if kind == "default":
            values = {}
        found = scaling.get("rope_theta") or self.get("rope_theta", "rotary_emb_base", default=theta)
        part = scaling.get("partial_rotary_factor") or self.get("partial_rotary_factor", "rotary_pct", default=fraction)
        return RopeConfig(
            theta=float(found),
            local_theta=None if local_theta is None else float(local_theta),
            fraction=float(part),
            layout=layout,  # type: ignore[arg-type]
            scaling=_SCALINGS[kind],  # type: ignore[arg-type]
            **values,
        )


_SCALINGS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}
_ROPE_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
_USED_BY = {
    "none": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": tuple(k for k in _ROPE_FIELDS if k not in ("low_freq_factor", "high_freq_factor")),
}


def rope_to(model: ModelConfig, *, by_layer: bool = False) -> dict[str, Any]:
    """Rotary positions in both spellings of config.json.

    Args:
        by_layer: as families write them whose local layers have a base of their own.

    Raises:
        UserError: a scaling that no published class has.
    """
    rope = model.rope
    theirs = {ours: theirs for theirs, ours in _SCALINGS.items()}
    if rope.scaling not in theirs:
        raise UserError(f'model.rope.scaling "{rope.scaling}" has no name in config.json; it cannot be exported')
    values = {key: getattr(rope, _ROPE_FIELDS[key]) for key in _USED_BY[rope.scaling]}
    values = {"rope_type": theirs[rope.scaling]} | {key: value for key, value in values.items() if value is not None}
    scaling = None if rope.scaling == "none" else values | {"type": values["rope_type"]}  # "type": until version 4.43
    part = {} if rope.fraction == 1.0 else {"partial_rotary_factor": rope.fraction}
    new: dict[str, Any] = values | {"rope_theta": rope.theta} | part
    old = {"rope_theta": rope.theta, "rope_scaling": scaling} | part
    if by_layer:
        local = rope.theta if rope.local_theta is None else rope.local_theta
        new = {"full_attention": new, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        old["rope_local_base_freq"] = local
    return {"rope_parameters": new} | old


def pattern_from(types: list[str]) -> tuple[str, ...]:
    """Their `layer_types`, one a layer, as the shortest pattern that repeats to it.

    Raises:
        UserError: a kind of layer that we do not have.
    """
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise UserError(f'layer_types has "{kind}", and supported are sliding_attention, full_attention')
    kinds = tuple("local" if kind == "sliding_attention" else "global" for kind in types)
    for size in range(1, len(kinds) + 1):
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds)):
            return kinds[:size]
    return kinds


def types_to(model: ModelConfig) -> list[str]:
    """`layer_types` of a model."""
    return ["sliding_attention" if model.is_local(i) else "full_attention" for i in range(model.num_layers)]
