"""A tiny prefix language model: a decoder that sees the beginning of each document in both directions.

    maxpretrain train configs/prefix_lm_tiny.py

Hardware: any; two CPU cores take a few minutes.
Paper: Raffel et al. 2020, arXiv:1910.10683, §3.2.
"""

from maxpretrain.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TokenizerConfig,
)
from maxpretrain.objectives import PrefixLM

config = Run(
    name="prefix-lm-tiny",
    steps=700,
    model=ModelConfig(
        num_layers=3,
        model_dim=128,
        num_heads=4,
        max_length=128,
        position="rope",
        norm="rmsnorm",
        activation="silu",
        gated=True,
        mlp_dim=344,
        bias=False,
        init_std=0.05,
    ),
    objective=PrefixLM(),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=16, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=175, prompts=("Return the ",)),
    checkpoint=CheckpointConfig(every=350),
)
