"""DeBERTa-v3 base, 184 M parameters: replaced tokens, with embeddings whose gradients are kept apart.

    maxpretrain train configs/deberta_v3_base.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: a v4-64 or 64 × A100; fewer devices take the batch in parts: --batch.microbatches 64.
Hours: `maxpretrain plan deberta_v3_base --target v5p-64` tells for yours. Expected loss: not measured here.
Paper: He et al. 2021, arXiv:2111.09543, §5.1: 500,000 steps of 8,192 sequences, β2 0.98, learning rate 5e-4 after 10,000 steps.
"""

import dataclasses

from maxpretrain.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TokenizerConfig,
)
from maxpretrain.models.families.deberta_v2 import PRESETS
from maxpretrain.objectives import RTD

config = Run(
    name="deberta-v3-base",
    steps=500_000,
    model=dataclasses.replace(PRESETS["deberta-v3-base"], heads=("replaced",)),
    objective=RTD(),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=8192, length=512, microbatches=16),
    optimizer=OptimizerConfig(
        peak_lr=5e-4,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.01,
        schedule=ScheduleConfig(shape="linear", warmup=10_000, final=0.0),
    ),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
