"""A tiny ELECTRA: a small generator replaces tokens, and the discriminator finds which.

    maxpretrain train configs/electra_tiny.py
    maxpretrain generate electra-tiny --prompt "Return <mask> if the string is empty."   # the generator fills

Hardware: any; two CPU cores take a few minutes.
Paper: Clark et al. 2020, arXiv:2003.10555.
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
from maxpretrain.objectives import ELECTRA

config = Run(
    name="electra-tiny",
    steps=1600,
    model=ModelConfig(
        architecture="encoder",
        num_layers=2,
        model_dim=128,
        num_heads=4,
        max_length=128,
        embed_norm=True,
        position="rope",
        norm_placement="pre",
        activation="gelu",
        heads=("replaced",),
        init_std=0.05,
    ),
    objective=ELECTRA(),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=32, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=250, prompts=("Return <mask> if the string is empty.",)),
    checkpoint=CheckpointConfig(every=500),
)
