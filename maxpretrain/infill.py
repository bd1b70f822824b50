"""What a network puts in the place of sentinels in a text, as span corruption teaches it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from maxpretrain.data.tokenizer import Tokenizer
from maxpretrain.generate import Generator
from maxpretrain.vocabulary import SENTINEL


def has_sentinels(prompt: str, tokenizer: Tokenizer) -> bool:
    """Whether a text has a sentinel of the tokenizer's, by its name, such as <extra_id_0>."""
    return any(tokenizer.id_of(name) is not None for name in SENTINEL.findall(prompt))


def is_filled(generator: Generator, prompt: str) -> bool:
    """Whether a prompt has sentinels that the network learned to fill."""
    return has_sentinels(prompt, generator.tokenizer) and generator.reading(prompt).answers


def said(generator: Generator, params: Any, prompts: Sequence[str], **how: Any) -> list[str]:
    """What a network makes of each text: where it fills sentinels, the text with spans in their place, and a sentinel that the
    answer passes over stays; else what the generator says.

    Args:
        generator: of a decoder or an encoder-decoder.
        params: of its model.
        prompts: texts; sentinels by their names: `Paris is the <extra_id_0> of France.`
        how: as `Generator` takes it; `max_new_tokens` bounds all spans of a text together.

    Reference: Raffel et al. 2020, arXiv:1910.10683, §3.1.4.
    """
    tokenizer = generator.tokenizer
    names = {tokenizer.id_of(name): name for name in tokenizer.named if SENTINEL.fullmatch(name)}
    texts = []
    for prompt, row in zip(prompts, generator.rows(params, prompts, **how), strict=True):
        if not is_filled(generator, prompt):
            texts.append(row.text)
            continue
        spans = spans_of(row.made, names, tokenizer)
        put = lambda found: spans.get(found[1], found[0])  # noqa: E731, B023
        texts.append(re.sub(f"{' ?' if tokenizer.spaces_lead else ''}({SENTINEL.pattern})", put, prompt))
    return texts


def spans_of(ids: Sequence[int], names: dict[int, str], tokenizer: Tokenizer) -> dict[str, str]:
    """Sentinel name -> the text that follows it in an answer; of one that comes twice the first counts."""
    spans: dict[str, list[int]] = {}
    current: list[int] = []  # what comes before the first sentinel belongs to none
    for id in ids:
        if id in names:
            current = []
            spans.setdefault(names[id], current)
        else:
            current.append(id)
    return {name: tokenizer.decode(span) for name, span in spans.items()}
