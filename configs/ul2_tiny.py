"""A tiny UL2: seven denoisers, short spans, long ones and prefixes, each announced by a mode token.

    maxpretrain train configs/ul2_tiny.py

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
    name="ul2-tiny",
    steps=800,
    model=ModelConfig(
        architecture="encoder-decoder",
        num_layers=2,
        model_dim=128,
        num_heads=4,
        mlp_dim=344,
        max_length=128,
        position="t5",
        norm="rmsnorm",
        activation="gelu_tanh",
        gated=True,
        bias=False,
        decoder_start_id=3,  # the tokenizer's <pad>, as T5 has it
        init_std=0.05,
    ),
    objective=UL2(),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=16, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=200, prompts=("[NLU]Return <extra_id_0> if the string is <extra_id_1>.",)),
    checkpoint=CheckpointConfig(every=400),
)
