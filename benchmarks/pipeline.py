"""How many tokens per second does the input pipeline make, on one thread, from a warm store?

    python benchmarks/pipeline.py [TOKENS] [--json]

A synthetic store of 20 M tokens in documents of 1 to 1,199 tokens, in a temporary folder. For each shape: `batch`
called in a loop, and `iterate`, where Grain makes batches ahead on a thread, by the clock and per second of processor
time. The target is 2 M tokens/s on one core.
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


def measure(pipeline: Pipeline, tokens: int) -> dict[str, int]:
    """Tokens per second: the best of three rounds, after one that warms up."""
    steps = max(tokens // (pipeline.batch_size * pipeline.length), 1)
    direct, ahead, core = [], [], []
    for _ in range(4):
        began = time.perf_counter()
        for step in range(steps):
            pipeline.batch(step)
        direct.append(time.perf_counter() - began)
        with pipeline.iterate(0, 2) as batches:
            next(batches)
            began, began_core = time.perf_counter(), time.process_time()
            for _batch in itertools.islice(batches, steps):
                pass
            ahead.append(time.perf_counter() - began)
            core.append(time.process_time() - began_core)  # of both threads: what counts on a busy machine
    made = steps * pipeline.batch_size * pipeline.length
    return {
        "batch_tokens_per_second": round(made / min(direct[1:])),
        "iterate_tokens_per_second": round(made / min(ahead[1:])),
        "iterate_tokens_per_core_second": round(made / min(core[1:])),
    }


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
                shape = {"length": length, "batch": size, "mask_documents": mask}
                results.append(shape | measure(pipeline, arguments.tokens))
    if arguments.json:
        print(json.dumps(results))
        return
    columns = ("batch", "iterate", "iterate, per core-second")
    print(f"{'length':>6} {'rows':>5} {'masked':>6}   Mtokens/s: " + "   ".join(columns))
    for r in results:
        speeds = [f"{r[k] / 1e6:.2f}".rjust(len(c)) for k, c in zip(list(r)[3:], columns, strict=True)]
        print(f"{r['length']:>6} {r['batch']:>5} {r['mask_documents']!s:>6}              " + "   ".join(speeds))


if __name__ == "__main__":
    main()
