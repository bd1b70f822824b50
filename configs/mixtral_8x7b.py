"""Mixtral 8x7B, 47 B parameters of which a token meets 13 B.

    maxpretrain train configs/mixtral_8x7b.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: v5p-256 and up, by the plan's estimate.
Hours: `maxpretrain plan mixtral_8x7b --target v5p-256` tells for yours. Expected loss: not measured here.
Paper: Jiang et al. 2024, arXiv:2401.04088. It prints the network alone; the optimizer's numbers are those of Llama 2 70B
(Touvron et al. 2023, arXiv:2307.09288, §2.2), the balance loss has the weight of the published config.json, 0.02.
"""

from maxpretrain.config import (
    BalanceConfig,
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
from maxpretrain.models.families.mixtral import PRESETS
from maxpretrain.objectives import CLM

config = Run(
    name="mixtral-8x7b",
    steps=500_000,
    model=PRESETS["mixtral-8x7b"],
    objective=CLM(),
    balance=BalanceConfig(loss="switch_mean", weight=0.02),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=1024, length=4096),
    optimizer=OptimizerConfig(
        peak_lr=1.5e-4, eps=1e-5, weight_decay=0.1, schedule=ScheduleConfig(warmup=2000, final=0.1)
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=8),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
