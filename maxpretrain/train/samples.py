"""What a network says at an evaluation, for the report."""

from __future__ import annotations

from typing import Any

from maxpretrain.config import EvaluationConfig
from maxpretrain.data.tokenizer import Tokenizer
from maxpretrain.fill import FillMask
from maxpretrain.generate import Generator
from maxpretrain.infill import is_filled, said
from maxpretrain.models import Model
from maxpretrain.objectives import Objective
from maxpretrain.vocabulary import MASKS


class Sampler:
    """Continues prompts, answers them or fills their sentinels (decoders and encoder-decoders), fills their masks (encoder).

    Args:
        model: the network; one without a language model head says nothing, nor does an encoder to a prompt without a mask.
        tokenizer: the one it is trained with.
        config: prompts, length and temperature.
        seed: of the draws.
        objective: what it is trained for, which says how a decoder reads a prompt.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, config: EvaluationConfig, seed: int, objective: Objective):
        self._config, self._seed = config, seed
        self._prompts = config.prompts if config.sample_tokens and "lm" in model.speaking[0].heads else ()
        self._generator: Generator | None = None
        self._fill: FillMask | None = None
        if model.config.architecture == "encoder":
            masks = any(tokenizer.id_of(name) is not None for name in MASKS)
            self._prompts = tuple(p for p in self._prompts if masks and any(name in p for name in MASKS))
            self._fill = FillMask(model, tokenizer) if self._prompts else None
        else:
            self._generator = Generator(model, tokenizer, objective)

    def __call__(self, params: Any) -> list[tuple[str, str]]:
        """(prompt, what follows it) for each prompt; a text that was filled in follows an arrow."""
        prompts, config = self._prompts, self._config
        if not prompts:
            return []
        if self._fill is not None:
            return [(p, f" → {text}") for p, text in zip(prompts, self._fill.filled(params, prompts), strict=True)]
        assert self._generator is not None
        how: dict[str, Any] = {"max_new_tokens": config.sample_tokens, "seed": self._seed}
        texts: dict[str, str] = {}
        for filled, temperature in ((True, 0.0), (False, config.temperature)):  # spans are the likeliest ones
            some = [prompt for prompt in prompts if is_filled(self._generator, prompt) == filled]
            made = said(self._generator, params, some, temperature=temperature, **how)
            texts |= dict(zip(some, made, strict=True))
        arrow = lambda prompt: " → " if self._generator.reading(prompt).answers else ""  # noqa: E731
        return [(prompt, arrow(prompt) + texts[prompt]) for prompt in prompts]
