"""How many tokens per second does the input pipeline make, on one thread, from a warm store?

    python benchmarks/pipeline.py [TOKENS] [--json]

A synthetic store of 20 M tokens in documents of 1 to 1,199 tokens, in a temporary folder. For each shape: `batch`
called in a loop, and `iterate`, where Grain makes batches ahead on a thread. The target is 2 M tokens/s on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from maxpretrain.data.pipeline import Pipeline
from maxpretrain.data.store import Store, StoreWriter
from maxpretrain.objectives import CLM

SHAPES = ((64, 12), (256, 32), (1024, 8))  # length, rows
STORE_TOKENS = 20_000_000


def synthetic(path: Path) -> Store:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1200, STORE_TOKENS // 600)
    ids = rng.integers(0, 32_000, int(lengths.sum()))
    with StoreWriter(path, vocab_size=32_000, tokenizer_fingerprint="synthetic") as writer:
        writer.add_many(ids, lengths, 4 * lengths)
    return Store.open(path)


def measure(pipeline: Pipeline, tokens: int) -> tuple[float, float]:
    """Tokens per second of `batch` and of `iterate`: the better of three rounds each, after one that warms up."""
    per_batch = pipeline.batch_size * pipeline.length
    steps = max(tokens // per_batch, 1)
    direct, ahead = [], []
    for _ in range(4):
        began = time.perf_counter()
        for step in range(steps):
            pipeline.batch(step)
        direct.append(time.perf_counter() - began)
        with pipeline.iterate(0, 2) as batches:
            next(batches)
            began = time.perf_counter()
            for _batch in itertools.islice(batches, steps):
                pass
            ahead.append(time.perf_counter() - began)
    return steps * per_batch / min(direct[1:]), steps * per_batch / min(ahead[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="?", type=int, default=1_000_000, help="tokens per measurement")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic(Path(folder) / "store")
        for length, size in SHAPES:
            for mask in (True, False):
                pipeline = Pipeline(
                    [store], (), CLM(mask_documents=mask), batch_size=size, length=length, seed=0, shuffle=True
                )
                direct, ahead = measure(pipeline, arguments.tokens)
                results.append(
                    {
                        "length": length,
                        "batch": size,
                        "mask_documents": mask,
                        "batch_tokens_per_second": round(direct),
                        "iterate_tokens_per_second": round(ahead),
                    }
                )
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"{'length':>6} {'batch':>5} {'masked':>6} {'batch() Mtok/s':>15} {'iterate() Mtok/s':>17}")
    for r in results:
        direct, ahead = r["batch_tokens_per_second"] / 1e6, r["iterate_tokens_per_second"] / 1e6
        print(f"{r['length']:>6} {r['batch']:>5} {r['mask_documents']!s:>6} {direct:>15.2f} {ahead:>17.2f}")


if __name__ == "__main__":
    main()
