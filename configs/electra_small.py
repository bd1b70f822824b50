"""ELECTRA small: 14 M parameters, trained to tell which tokens a generator replaced.

    maxpretrain train configs/electra_small.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: one GPU of 16 GB, or any TPU.
Hours: `maxpretrain plan electra_small --target v5e-4` tells for yours. Expected loss: not measured here.
Paper: Clark et al. 2020, arXiv:2003.10555, table 6: a million steps of 128 sequences of 128 tokens, a generator of a quarter of the width.
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
from maxpretrain.models.families.electra import PRESETS
from maxpretrain.objectives import ELECTRA

config = Run(
    name="electra-small",
    steps=1_000_000,
    model=PRESETS["electra-small"],
    objective=ELECTRA(rate=0.15, generator_share=0.25, rtd_weight=50.0),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=128, length=128),
    optimizer=OptimizerConfig(
        peak_lr=5e-4,
        b2=0.999,
        eps=1e-6,
        weight_decay=0.01,
        schedule=ScheduleConfig(shape="linear", warmup=10_000, final=0.0),
    ),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
