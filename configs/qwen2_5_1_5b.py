"""The shape of Qwen2.5-1.5B at length 1024: the one that single-GPU speed is compared at.

    maxpretrain train configs/qwen2_5_1_5b.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: one GPU of 141 GB (H200), or eight of 80 GB with --mesh.fsdp 8.
Hours: `maxpretrain plan qwen2_5_1_5b --target h200 --mfu 0.5` tells for yours.
Expected loss: not measured.
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
from maxpretrain.models.families.qwen2 import PRESETS
from maxpretrain.objectives import CLM

config = Run(
    name="qwen2.5-1.5b",
    steps=50_000,
    model=PRESETS["qwen2.5-1.5b"],
    objective=CLM(mask_documents=False),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.001),
    batch=BatchConfig(size=512, length=1024, microbatches=16),
    optimizer=OptimizerConfig(
        peak_lr=3e-4, weight_decay=0.1, schedule=ScheduleConfig(shape="wsd", warmup=1000, final=0.0)
    ),
    evaluation=EvaluationConfig(every=1000, windows=10_240),
    checkpoint=CheckpointConfig(every=1000),
)
