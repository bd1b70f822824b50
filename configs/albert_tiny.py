"""A tiny ALBERT: one layer's parameters serve four, n-grams are masked, and the order of two texts is asked for.

    maxpretrain train configs/albert_tiny.py

Hardware: any; two CPU cores take a few minutes.
Paper: Lan et al. 2020, arXiv:1909.11942.
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
from maxpretrain.objectives import MLM

config = Run(
    name="albert-tiny",
    steps=700,
    model=ModelConfig(
        architecture="encoder",
        num_layers=4,
        layer_groups=1,
        model_dim=128,
        embed_dim=64,
        num_heads=4,
        max_length=128,
        token_types=2,
        embed_norm=True,
        position="rope",
        norm_placement="pre",
        activation="gelu_tanh",
        heads=("lm", "pooler", "pair"),
        lm_transform=True,
        lm_bias=True,
        init_std=0.05,
    ),
    objective=MLM(pair="sop", ngram=3, whole_word=True),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=32, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=175, prompts=("Return <mask> if the string is empty.",)),
    checkpoint=CheckpointConfig(every=350),
)
