"""A tiny UL2 in a decoder alone: inputs, read in both directions, and targets in one row.

    maxpretrain train configs/ul2_decoder_tiny.py
    maxpretrain generate ul2-decoder-tiny --prompt "[NLU]Return <extra_id_0> if the string is <extra_id_1>."

Hardware: any; two CPU cores take a few minutes.
Paper: Tay et al. 2022, arXiv:2205.05131.
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
from maxpretrain.objectives import UL2

config = Run(
    name="ul2-decoder-tiny",
    steps=800,
    model=ModelConfig(
        num_layers=3,
        model_dim=128,
        num_heads=4,
        mlp_dim=344,
        max_length=128,
        position="rope",
        norm="rmsnorm",
        activation="gelu_tanh",
        gated=True,
        bias=False,
        init_std=0.05,
    ),
    objective=UL2(decoder_format="prefix"),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=16, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=200, prompts=("[NLU]Return <extra_id_0> if the string is <extra_id_1>.",)),
    checkpoint=CheckpointConfig(every=400),
)
