"""A tiny SpanBERT: whole spans are masked, and told from their boundaries too.

    maxpretrain train configs/spanbert_tiny.py

Hardware: any; two CPU cores take a few minutes.
Paper: Joshi et al. 2019, arXiv:1907.10529.
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
from maxpretrain.objectives import SpanBERT

config = Run(
    name="spanbert-tiny",
    steps=800,
    model=ModelConfig(
        architecture="encoder",
        num_layers=2,
        model_dim=128,
        num_heads=4,
        max_length=128,
        position="rope",
        norm_placement="pre",
        activation="gelu",
        embed_norm=True,
        heads=("lm", "span_boundary"),
        lm_transform=True,
        lm_bias=True,
        init_std=0.05,
    ),
    objective=SpanBERT(),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=32, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=200, prompts=("Return <mask> if the string is empty.",)),
    checkpoint=CheckpointConfig(every=400),
)
