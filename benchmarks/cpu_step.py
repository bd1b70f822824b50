"""Is our train step on a CPU as fast as PyTorch's for the same model?

    python benchmarks/cpu_step.py [--torch-python PYTHON] [--shapes small medium] [--rounds 20] [--json]

The model is GPT-2 without biases over 65 characters (tied embeddings, learned positions, no dropout), trained by AdamW with
gradients clipped to a norm of 1, in float32. Each side runs in a process of its own, on the same cores, and they take turns:
while one does a round of steps the other waits. Both start from the same parameters and see the same batches, and their
losses are compared, so that they do the same work.

Ours is what `maxpretrain train` runs: prepare_process, hardware.resolve, make_train_step, jit with donation, batches from
numpy, metrics read one step late. Theirs is what a careful PyTorch user runs: fused query-key-value product,
scaled_dot_product_attention, cross_entropy, fused AdamW. `--torch-keep-memory` gives PyTorch the malloc settings that
prepare_process gives us; `--torch-compile` gives it torch.compile (needs a C++ compiler).

A ratio below 1 says that ours is faster. `cpu` is processor time per step, of both cores, waiting threads that spin included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 65
LEARNING_RATE, B1, B2, EPS, DECAY, CLIP = 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0
CHECKED = 5  # steps whose losses are compared; they also warm up


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    dim: int
    heads: int
    length: int
    batch: int
    steps: int  # per round
    vocab: int = VOCAB


SHAPES = {
    "small": Shape(layers=4, dim=128, heads=4, length=64, batch=12, steps=10),
    "medium": Shape(layers=6, dim=384, heads=6, length=256, batch=16, steps=1),
}


class Batches:
    """Random tokens, the same for both sides."""

    def __init__(self, shape: Shape):
        self.shape, self.rng = shape, np.random.default_rng(0)

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, int32 [B, T] each."""
        tokens = self.rng.integers(0, self.shape.vocab, (self.shape.batch, self.shape.length + 1), np.int32)
        return tokens[:, :-1], tokens[:, 1:]


Stepper = Callable[[int], list[float]]  # steps to do -> their losses


def our_run(shape: Shape, activation: str, arguments: argparse.Namespace) -> Any:
    from maxpretrain import config
    from maxpretrain.objectives import CLM

    return config.Run(
        model=config.ModelConfig(
            vocab_size=shape.vocab,
            num_layers=shape.layers,
            model_dim=shape.dim,
            num_heads=shape.heads,
            max_length=shape.length,
            activation=activation,  # type: ignore[arg-type]
            bias=False,
        ),
        objective=CLM(mask_documents=arguments.mask_documents),
        batch=config.BatchConfig(size=shape.batch, length=shape.length),
        optimizer=config.OptimizerConfig(
            peak_lr=LEARNING_RATE,
            b1=B1,
            b2=B2,
            eps=EPS,
            weight_decay=DECAY,
            clip_norm=CLIP,
            schedule=config.ScheduleConfig(shape="constant", warmup=0),
        ),
        compute=config.ComputeConfig(cpu_devices=arguments.cpu_devices),
    )


def ours(shape: Shape, activation: str, parameters: Path, arguments: argparse.Namespace) -> tuple[Stepper, str]:
    """Our side; leaves its initial parameters in `parameters`."""
    from maxpretrain import environment

    run = our_run(shape, activation, arguments)
    environment.prepare_process(run)
    import jax

    from maxpretrain import hardware, mesh, models, optim
    from maxpretrain.nn.base import is_spec
    from maxpretrain.optim.schedules import schedule
    from maxpretrain.train import state as train_state
    from maxpretrain.train.step import make_train_step

    layout = mesh.make_layout(run.mesh)
    execution, _ = hardware.resolve(
        run, jax.devices()[0], devices=layout.num_devices, batch_parts=layout.extent("batch")
    )
    model = models.build(run.model, execution)
    decay = jax.tree.map(lambda spec: spec.role in ("matrix", "embedding"), model.abstract, is_leaf=is_spec)
    lengths = {"steps": run.steps, "tokens_per_step": run.tokens_per_step}
    optimizer = optim.build_optimizer(run.optimizer, decay_mask=decay, **lengths)
    rate = schedule(run.optimizer.schedule, peak_lr=LEARNING_RATE, **lengths)
    step = make_train_step(model, run.objective, optimizer, run.optimizer, rate, seed=0, microbatches=1)
    batches = Batches(shape)

    def batch() -> dict[str, jax.Array]:
        inputs, labels = batches.next()
        raw = np.concatenate([inputs, labels[:, -1:]], 1)
        return layout.global_batch(run.objective.examples(raw), shape.batch)

    with mesh.use(layout):
        state = train_state.init_state(model, optimizer, layout, seed=0)
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state["params"]))
        np.savez(parameters, **{jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves})
        fields = {
            name: jax.ShapeDtypeStruct((shape.batch, *size), dtype, sharding=layout.batch_sharding())
            for name, (size, dtype) in run.objective.fields(shape.length).items()
        }
        abstract = train_state.abstract_state(model, optimizer, layout)
        compiled = jax.jit(step, donate_argnums=0).lower(abstract, fields).compile()
    if arguments.hlo:
        Path(arguments.hlo).write_text(compiled.as_text())

    def steps(count: int) -> list[float]:
        nonlocal state
        losses, last = [], None
        for _ in range(count):
            state, metrics = compiled(state, batch())
            if last is not None:
                losses.append(float(jax.device_get(last)["loss"]))
            last = metrics
        losses.append(float(jax.device_get(last)["loss"]))
        return losses

    return steps, f"jax {jax.__version__}, {layout.num_devices} XLA devices, {execution}"


def torch_model(shape: Shape, activation: str) -> Any:
    """GPT-2's network in PyTorch; forward(tokens, labels) is the mean cross entropy."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            d = shape.dim
            self.norm1, self.norm2 = nn.LayerNorm(d, bias=False), nn.LayerNorm(d, bias=False)
            self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
            self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

        def forward(self, x):
            b, t, d = x.shape
            heads = (b, t, shape.heads, d // shape.heads)
            q, k, v = (a.view(heads).transpose(1, 2) for a in self.qkv(self.norm1(x)).split(d, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
            form = "tanh" if activation == "gelu_tanh" else "none"
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate=form))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(shape.vocab, shape.dim), nn.Embedding(shape.length, shape.dim)
            self.blocks = nn.ModuleList(Block() for _ in range(shape.layers))
            self.norm = nn.LayerNorm(shape.dim, bias=False)

        def forward(self, tokens, labels):
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.tokens.weight)
            return F.cross_entropy(logits.view(-1, shape.vocab), labels.reshape(-1))

    return GPT()


def in_torch(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters by the PyTorch model's names: its matrices are transposed."""
    stack, dim = "decoder.stack.block.", values["embed.table"].shape[1]
    named = {"tokens.weight": values["embed.table"], "positions.weight": values["decoder.input.positions.table"]}
    named["norm.weight"] = values["decoder.norm.scale"]
    for i in range(len(values[stack + "mlp_norm.scale"])):
        q, k, v, out = (values[f"{stack}attention.{n}.kernel"][i] for n in ("query", "key", "value", "out"))
        named |= {
            f"blocks.{i}.norm1.weight": values[stack + "attention_norm.scale"][i],
            f"blocks.{i}.norm2.weight": values[stack + "mlp_norm.scale"][i],
            f"blocks.{i}.qkv.weight": np.concatenate([w.reshape(dim, -1) for w in (q, k, v)], 1).T,
            f"blocks.{i}.out.weight": out.reshape(-1, dim).T,
            f"blocks.{i}.up.weight": values[stack + "mlp.up.kernel"][i].T,
            f"blocks.{i}.down.weight": values[stack + "mlp.down.kernel"][i].T,
        }
    return named


def theirs(shape: Shape, activation: str, parameters: Path, arguments: argparse.Namespace) -> tuple[Stepper, str]:
    """PyTorch's side; begins from `parameters`."""
    if arguments.torch_keep_memory:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from maxpretrain.environment import keep_freed_memory

        keep_freed_memory()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torch_model(shape, activation)
    named = in_torch(dict(np.load(parameters)))
    model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in named.items()})
    plain = [p for name, p in model.named_parameters() if p.dim() < 2 or name == "positions.weight"]
    decayed = [p for name, p in model.named_parameters() if p.dim() >= 2 and name != "positions.weight"]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(B1, B2),
        eps=EPS,
        fused=True,
    )
    forward = torch.compile(model) if arguments.torch_compile else model
    batches = Batches(shape)

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            tokens, labels = (torch.from_numpy(x).long() for x in batches.next())
            loss = forward(tokens, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
        return losses

    return steps, f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def work(arguments: argparse.Namespace) -> None:
    """A side's process: answers each line `n` on standard input with the time that n steps took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    side = {"ours": ours, "theirs": theirs}[arguments.worker]
    began = time.perf_counter()
    steps, what = side(
        Shape(**json.loads(arguments.shape)), arguments.activation, Path(arguments.parameters), arguments
    )
    answers.write(
        json.dumps({"what": what, "setup_seconds": time.perf_counter() - began, "losses": steps(CHECKED)}) + "\n"
    )
    for line in sys.stdin:
        count = int(line)
        began, began_cpu = time.perf_counter(), time.process_time()
        steps(count)
        spent = {"seconds": (time.perf_counter() - began) / count, "cpu": (time.process_time() - began_cpu) / count}
        answers.write(json.dumps(spent) + "\n")


class Side:
    """The parent's end of a side's process."""

    def __init__(self, python: str, command: list[str]):
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.began: dict[str, Any] = self.answer()
        self.rounds: list[dict[str, float]] = []

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"one side ended with status {self.process.wait()}; its message is above")
        return json.loads(line)

    def round(self, steps: int) -> None:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.rounds.append(self.answer())

    def column(self, name: str) -> list[float]:
        return [r[name] for r in self.rounds]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, activation: str, arguments: argparse.Namespace, passed_on: list[str]) -> dict[str, Any]:
    """One shape: both sides in turn."""
    shape = dataclasses.replace(SHAPES[name], **({"vocab": arguments.vocab} if arguments.vocab else {}))
    with tempfile.TemporaryDirectory() as folder:
        command = ["--shape", json.dumps(dataclasses.asdict(shape)), "--activation", activation, *passed_on]
        command += ["--parameters", str(Path(folder) / "parameters.npz")]
        we = Side(sys.executable, ["--worker", "ours", *command])
        they = Side(arguments.torch_python, ["--worker", "theirs", *command])
    difference = max(abs(a - b) for a, b in zip(we.began["losses"], they.began["losses"], strict=True))
    if difference > 1e-3:
        sys.exit(f"the two sides do not train the same model: losses {we.began['losses']} and {they.began['losses']}")
    for _ in range(arguments.rounds):
        we.round(shape.steps)
        they.round(shape.steps)
    we.close()
    they.close()
    pairs = [a / b for a, b in zip(we.column("seconds"), they.column("seconds"), strict=True)]
    result = {"shape": name, "activation": activation, "loss_difference": difference, "ratio": statistics.median(pairs)}
    for side, label in ((we, "ours"), (they, "theirs")):
        seconds = side.column("seconds")
        result[label] = {
            "what": side.began["what"],
            "setup_seconds": side.began["setup_seconds"],
            "median": statistics.median(seconds),
            "best": min(seconds),
            "cpu": statistics.median(side.column("cpu")),
        }
    result["ratio_of_best"] = result["ours"]["best"] / result["theirs"]["best"]
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['shape']} ({result['activation']}), losses equal to {result['loss_difference']:.0e}")
    for label in ("ours", "theirs"):
        side = result[label]
        print(
            f"  {label:6}  median {1e3 * side['median']:8.1f} ms  best {1e3 * side['best']:8.1f} ms  "
            f"cpu {1e3 * side['cpu']:8.1f} ms  set up in {side['setup_seconds']:.1f} s  {side['what']}"
        )
    print(f"  ratio {result['ratio']:.3f} (of the best {result['ratio_of_best']:.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="what to measure")
    parser.add_argument("--activation", choices=("gelu_tanh", "gelu"), default="gelu_tanh", help="gelu is the erf form")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side")
    parser.add_argument("--vocab", type=int, default=0, help="rows of the embedding; 0: 65")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch and numpy")
    parser.add_argument("--torch-keep-memory", action="store_true", help="PyTorch with our malloc settings")
    parser.add_argument("--torch-compile", action="store_true", help="PyTorch through torch.compile")
    parser.add_argument(
        "--mask-documents", action="store_true", help="ours with per-token positions and document masks"
    )
    parser.add_argument("--cpu-devices", type=int, default=0, help="XLA devices of ours; 0: as train chooses")
    parser.add_argument("--hlo", default="", help="write our compiled program to this file")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
    for internal in ("--worker", "--shape", "--parameters"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    switches = ("torch_keep_memory", "torch_compile", "mask_documents")
    passed_on = ["--" + name.replace("_", "-") for name in switches if getattr(arguments, name)]
    passed_on += ["--cpu-devices", str(arguments.cpu_devices), "--hlo", arguments.hlo]
    results = []
    for name in arguments.shapes:
        results.append(compare(name, arguments.activation, arguments, passed_on))
        if not arguments.json:
            show(results[-1])
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
