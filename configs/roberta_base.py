"""RoBERTa base, 125 M parameters: masks drawn anew each epoch, full sentences, large batches.

    maxpretrain train configs/roberta_base.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: a v4-64 or 64 × A100; fewer devices take the batch in parts: --batch.microbatches 64.
Hours: `maxpretrain plan roberta_base --target v5p-64` tells for yours. Expected loss: not measured here.
Paper: Liu et al. 2019, arXiv:1907.11692, §4 and table 9: 500,000 steps of 8,192 sequences, no clipping.
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
from maxpretrain.models.families.roberta import PRESETS
from maxpretrain.objectives import MLM

config = Run(
    name="roberta-base",
    steps=500_000,
    model=PRESETS["roberta-base"],
    objective=MLM(count="roberta", mask_documents=False),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=8192, length=512, microbatches=8),
    optimizer=OptimizerConfig(
        peak_lr=6e-4,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.01,
        clip_norm=None,
        schedule=ScheduleConfig(shape="linear", warmup=24_000, final=0.0),
    ),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
