"""BART base, 139 M parameters: a third of the words in spans that one mask each stands for, sentences permuted.

    maxpretrain train configs/bart_base.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: a v4-64 or 64 × A100; fewer devices take the batch in parts: --batch.microbatches 64.
Hours: `maxpretrain plan bart_base --target v5p-64` tells for yours. Expected loss: not measured here.
Paper: Lewis et al. 2019, arXiv:1910.13461, §5.1: 500,000 steps of 8,000 sequences (8,192 here, which devices divide), dropout off in
the last tenth (not done here). The optimizer's numbers are RoBERTa's, whose scale it follows; the paper does not print its own.
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
from maxpretrain.models.families.bart import PRESETS
from maxpretrain.objectives import BART

config = Run(
    name="bart-base",
    steps=500_000,
    model=PRESETS["bart-base"],
    objective=BART(infill=0.3, poisson=3.0, permute_sentences=1.0),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=8192, length=512, microbatches=16),
    optimizer=OptimizerConfig(
        peak_lr=6e-4,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.01,
        schedule=ScheduleConfig(shape="linear", warmup=10_000, final=0.0),
    ),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
