"""A tiny T5: spans are taken out of the text, and the decoder says what was there.

    maxpretrain train configs/t5_tiny.py
    maxpretrain generate t5-tiny --prompt "Return <extra_id_0> if the string is <extra_id_1>."

Hardware: any; two CPU cores take a few minutes.
Paper: Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202 (gated).
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
from maxpretrain.objectives import SpanCorruption

config = Run(
    name="t5-tiny",
    steps=1000,
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
    objective=SpanCorruption(),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=32, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=250, prompts=("Return <extra_id_0> if the string is <extra_id_1>.",)),
    checkpoint=CheckpointConfig(every=500),
)
