"""DeepSeek-V3, 671 B parameters of which a token meets 37 B: latent attention, 256 experts balanced by a bias, two tokens ahead.

    maxpretrain train configs/deepseek_v3.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: v5p-4096 with --mesh.tensor 2; a v5p-2048 would be 99 % full, by the plan's estimate.
Hours: `maxpretrain plan deepseek_v3 --target v5p-2048` tells for yours. Expected loss: not measured here.
Paper: DeepSeek-AI 2024, arXiv:2412.19437, §4.2: 14.8 trillion tokens at length 4,096; 2.2e-4 after 2,000 steps, held, then down to a tenth
by cosine (here held and then lowered by the wsd schedule); bias step 0.001, sequence loss 1e-4, λ 0.3 for 10 trillion tokens and
0.1 for the rest.
The paper's batch grows from 3,072 to 15,360 sequences; here it is 15,360.
"""

from maxpretrain.config import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TokenizerConfig,
)
from maxpretrain.models.families.deepseek_v3 import PRESETS
from maxpretrain.objectives import MultiToken

config = Run(
    name="deepseek-v3",
    steps=235_000,
    model=PRESETS["deepseek-v3"],
    objective=MultiToken(form="sequential", depth=1, weight=0.1, schedule=((159_000, 0.3), (159_001, 0.1))),
    balance=BalanceConfig(loss="sequence", weight=1e-4, bias_rate=0.001),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=15_360, length=4096, microbatches=15),
    optimizer=OptimizerConfig(
        peak_lr=2.2e-4,
        weight_decay=0.1,
        schedule=ScheduleConfig(shape="wsd", warmup=2000, decay=76_000, final=0.1),
    ),
    mesh=MeshConfig(data=1, fsdp=-1, expert=16),
    compute=ComputeConfig(remat="full"),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
