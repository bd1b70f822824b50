"""A tiny BART: the text is written again from one with holes, its sentences in another order.

    maxpretrain train configs/bart_tiny.py
    maxpretrain generate bart-tiny --prompt "Return <mask> if the string is empty."

Hardware: any; two CPU cores take a few minutes.
Paper: Lewis et al. 2019, arXiv:1910.13461.
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
from maxpretrain.objectives import BART

config = Run(
    name="bart-tiny",
    steps=700,
    model=ModelConfig(
        architecture="encoder-decoder",
        num_layers=2,
        model_dim=128,
        num_heads=4,
        max_length=256,
        embed_norm=True,
        activation="gelu",
        decoder_start_id=2,  # the tokenizer's </s>, as BART has it
        init_std=0.05,
    ),
    objective=BART(),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=16, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=175, prompts=("Return <mask> if the string is empty.",)),
    checkpoint=CheckpointConfig(every=350),
)
