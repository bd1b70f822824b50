"""How fast objectives make their examples, and what the masked ones save at the head.

    python benchmarks/objectives.py            # raw tokens per second of processor time, on one core, at length 512
    python benchmarks/objectives.py --head     # loss at 15 % of the places against loss at all of them, processor time

The text is the embedded corpus, tokenized by a sentencepiece model of 8,192 pieces with what every objective needs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from maxpretrain.config import DataConfig, ModelConfig, Run, TokenizerConfig
from maxpretrain.objectives import (
    BART,
    CLM,
    ELECTRA,
    MLM,
    RTD,
    UL2,
    FillInTheMiddle,
    Mixture,
    MultiToken,
    Objective,
    PrefixLM,
    SpanBERT,
    SpanCorruption,
)

LENGTH, ROWS, ROUNDS = 512, 32, 7
OBJECTIVES: dict[str, Objective] = {
    "CLM": CLM(),
    "PrefixLM": PrefixLM(),
    "FillInTheMiddle, characters": FillInTheMiddle(),
    "FillInTheMiddle, tokens": FillInTheMiddle(level="token"),
    "MultiToken": MultiToken(),
    "MLM": MLM(),
    "MLM, whole words": MLM(whole_word=True),
    "MLM, n-grams and SOP": MLM(ngram=3, pair="sop"),
    "MLM, NSP": MLM(pair="nsp"),
    "SpanBERT": SpanBERT(),
    "ELECTRA": ELECTRA(),
    "RTD": RTD(),
    "SpanCorruption": SpanCorruption(),
    "BART": BART(),
    "UL2": UL2(),
    "SpanCorruption, decoder": SpanCorruption(decoder_format="prefix"),
    "UL2, decoder": UL2(decoder_format="prefix"),
    "CLM and UL2, decoder": Mixture(objectives=(CLM(), UL2(decoder_format="prefix"))),
}


def all_symbols() -> tuple[str, ...]:
    found = dict.fromkeys(s for objective in OBJECTIVES.values() for s in objective.symbols())
    spans = [name for name in found if name.startswith("<extra_id_")]
    spans.sort(key=lambda name: -int(name[len("<extra_id_") : -1]))
    return (*(name for name in found if name not in spans), *spans)


def median_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        begun = time.process_time()  # of all threads: what counts on a busy machine
        call()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def hosts(cache: str, only: str) -> None:
    from maxpretrain.data.pipeline import Pipeline
    from maxpretrain.data.prepare import prepare
    from maxpretrain.vocabulary import Vocabulary

    tokenizer = TokenizerConfig(vocab_size=8192, algorithm="bpe", control_symbols=all_symbols())
    prepared = prepare(Run(tokenizer=tokenizer, data=DataConfig(cache=cache)))
    vocabulary = Vocabulary.of(prepared.tokenizer)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name, objective in OBJECTIVES.items():
        if only not in name:
            continue
        bound = objective.bind(vocabulary)
        pipeline = Pipeline(prepared.train, (), bound, batch_size=ROWS, length=LENGTH, seed=0, shuffle=True)
        step = iter(range(10**9))
        seconds = median_seconds(lambda: pipeline.batch(next(step)))  # noqa: B023
        raw = bound.raw_length(LENGTH) - bound.overlap
        print(f"{name:<30} {ROWS * raw / seconds / 1e6:7.2f} M raw tokens/s  ({raw} raw tokens an example)", flush=True)


def head() -> None:
    import jax
    import jax.numpy as jnp

    from maxpretrain.models import build
    from maxpretrain.objectives.cross_entropy import gathered, token_cross_entropy

    config = ModelConfig(
        architecture="encoder",
        vocab_size=30_522,
        num_layers=1,
        model_dim=256,
        num_heads=4,
        lm_transform=True,
        lm_bias=True,
    )
    model = build(config)
    params = model.init(jax.random.key(0))
    batch, places = 4, MLM().budget(LENGTH)
    hidden = jax.random.normal(jax.random.key(1), (batch, LENGTH, config.model_dim))
    where = jnp.tile(jnp.arange(places, dtype=jnp.int32) * (LENGTH // places), (batch, 1))
    everywhere = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (batch, 1))

    def loss(params: object, hidden: jax.Array, at: jax.Array) -> jax.Array:
        labels = jnp.zeros(at.shape, jnp.int32)
        return token_cross_entropy(model, params, gathered(hidden, at), labels, jnp.ones(at.shape))[0]

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    runs = {"budget": where, "all": everywhere}
    seconds = {
        name: median_seconds(lambda at=at: jax.block_until_ready(step(params, hidden, at))) for name, at in runs.items()
    }
    print(f"head and its gradient at {places} of {LENGTH} places: {1e3 * seconds['budget']:.0f} ms; at all: "
          f"{1e3 * seconds['all']:.0f} ms; {seconds['all'] / seconds['budget']:.1f} times as long")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head", action="store_true", help="measure the head instead")
    parser.add_argument("--only", default="", help="objectives with this in their name")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "maxpretrain-benchmark"))
    options = parser.parse_args()
    head() if options.head else hosts(options.cache, options.only)


if __name__ == "__main__":
    main()
