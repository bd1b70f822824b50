"""A tiny mixture of experts: eight, of which each token goes through two, kept even by a balance loss.

    maxpretrain train configs/moe_tiny.py
    maxpretrain train configs/moe_tiny.py --name moe-unbalanced --balance.loss none

Hardware: any; two CPU cores take a few minutes.
Papers: Jiang et al. 2024, arXiv:2401.04088 (experts); Fedus et al. 2021, arXiv:2101.03961 (the loss).
Watch: train/expert_load_spread and train/expert_load, with and without the loss.
"""

from maxpretrain.config import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TokenizerConfig,
)
from maxpretrain.objectives import CLM

config = Run(
    name="moe-tiny",
    steps=400,
    model=ModelConfig(
        num_layers=2,
        model_dim=128,
        num_heads=4,
        max_length=128,
        position="rope",
        norm="rmsnorm",
        activation="silu",
        gated=True,
        mlp_dim=344,
        bias=False,
        init_std=0.05,
        moe=MoEConfig(num_experts=8, top_k=2, expert_dim=128),
    ),
    objective=CLM(),
    balance=BalanceConfig(loss="switch_mean", weight=0.01, z_weight=1e-3),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=16, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=100, prompts=("Return the ",)),
    checkpoint=CheckpointConfig(every=200),
)
