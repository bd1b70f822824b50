"""UL2, 19 B parameters: seven denoisers, each announced by a mode token.

    maxpretrain train configs/ul2.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: v5p-256 and up, by the plan's estimate.
Hours: `maxpretrain plan ul2 --target v5p-256` tells for yours. Expected loss: not measured here.
Paper: Tay et al. 2022, arXiv:2205.05131, §4.1: two million steps of 1,024 sequences of 512 tokens, a trillion in all.
The paper has Adafactor with an inverse square root schedule; AdamW at 3e-4 is ours.
The tokenizer needs 128 sentinels, <extra_id_0> to <extra_id_127>, and [NLU], [NLG], [S2S]; T5's own has 100 and none of these.
One that is trained for the run (--tokenizer.kind sentencepiece --tokenizer.path '') has them.
"""

import dataclasses

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
from maxpretrain.models.families.t5 import size
from maxpretrain.objectives import UL2

config = Run(
    name="ul2",
    steps=2_000_000,
    model=dataclasses.replace(size(32, 4096, 16, 16_384, head_dim=256), activation="silu"),
    objective=UL2(z_loss=1e-4),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=1024, length=512, microbatches=2),
    optimizer=OptimizerConfig(
        peak_lr=3e-4,
        weight_decay=0.0,
        schedule=ScheduleConfig(shape="inverse_sqrt", warmup=10_000, final=0.0),
    ),
    mesh=MeshConfig(data=1, fsdp=-1),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
