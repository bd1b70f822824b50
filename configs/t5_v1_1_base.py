"""T5 v1.1 base, 248 M parameters: span corruption, 15 % in spans of three tokens.

    maxpretrain train configs/t5_v1_1_base.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: a v3-128 or 32 × A100; fewer devices take the batch in parts: --batch.microbatches 16.
Hours: `maxpretrain plan t5_v1_1_base --target v5p-64` tells for yours. Expected loss: not measured here.
Paper: Raffel et al. 2020, arXiv:1910.10683, §3.1 and §3.7: a million steps of 2,048 sequences of 512 tokens, no dropout (v1.1).
The paper has Adafactor at 0.01 / √(step / 10,000); AdamW at a tenth of that is ours.
"""

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
from maxpretrain.models.families.t5 import PRESETS
from maxpretrain.objectives import SpanCorruption

config = Run(
    name="t5-v1.1-base",
    steps=1_000_000,
    model=PRESETS["t5-v1.1-base"],
    objective=SpanCorruption(density=0.15, mean_span=3.0, z_loss=1e-4),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=2048, length=512, microbatches=4),
    optimizer=OptimizerConfig(
        peak_lr=1e-3,
        weight_decay=0.0,
        schedule=ScheduleConfig(shape="inverse_sqrt", warmup=10_000, final=0.0),
    ),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
