"""A tiny decoder that fills in the middle of a text as well as it continues one.

    maxpretrain train configs/fim_tiny.py
    maxpretrain generate fim-tiny --prompt "Return the " --suffix " of the list."

Hardware: any; two CPU cores take a few minutes.
Paper: Bavarian et al. 2022, arXiv:2207.14255.
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
from maxpretrain.objectives import FillInTheMiddle

config = Run(
    name="fim-tiny",
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
    objective=FillInTheMiddle(),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=16, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=175, prompts=("Return the ",)),
    checkpoint=CheckpointConfig(every=350),
)
