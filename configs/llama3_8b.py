"""Llama-3-8B at its pretraining length of 8192.

    maxpretrain train configs/llama3_8b.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: v5p-64 and up, by the plan's estimate. Fewer or smaller devices take the batch of 4 million tokens in more parts:
--batch.microbatches 32 on a v5p-8, a v6e-16 or 8 × H100.
Hours: `maxpretrain plan llama3_8b --target v5p-128 --mfu 0.55` tells for yours.
Expected loss: not measured. The schedule is the paper's (arXiv:2407.21783, section 3.4) for the smallest model.
"""

from maxpretrain.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TokenizerConfig,
)
from maxpretrain.models.families.llama import PRESETS
from maxpretrain.objectives import CLM

config = Run(
    name="llama3-8b",
    steps=100_000,
    model=PRESETS["llama-3-8b"],
    objective=CLM(mask_documents=True),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=512, length=8192, microbatches=4),
    optimizer=OptimizerConfig(peak_lr=3e-4, weight_decay=0.1, schedule=ScheduleConfig(warmup=2000, final=0.01)),
    mesh=MeshConfig(data=1, fsdp=-1),
    evaluation=EvaluationConfig(every=1000, windows=4096),
    checkpoint=CheckpointConfig(every=500),
)
