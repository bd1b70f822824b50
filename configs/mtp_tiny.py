"""A tiny decoder that predicts several tokens ahead, by DeepSeek-V3's modules one after another.

    maxpretrain train configs/mtp_tiny.py
    maxpretrain train configs/mtp_tiny.py --name mtp-parallel --objective.form parallel --objective.depth 3

Hardware: any; two CPU cores take a few minutes.
Papers: DeepSeek-AI 2024, arXiv:2412.19437, §2.2; Gloeckle et al. 2024, arXiv:2404.19737 (the parallel form).
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
from maxpretrain.objectives import MultiToken

config = Run(
    name="mtp-tiny",
    steps=500,
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
    objective=MultiToken(form="sequential", depth=2),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=16, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=125, prompts=("Return the ",)),
    checkpoint=CheckpointConfig(every=250),
)
