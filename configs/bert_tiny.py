"""A tiny BERT: masked language modelling with whole words, on the English that every Python installation holds.

    maxpretrain train configs/bert_tiny.py
    maxpretrain generate bert-tiny --prompt "Return <mask> if the string is empty."

Hardware: any; two CPU cores take a few minutes.
Paper: Devlin et al. 2018, arXiv:1810.04805; without the pairs of sentences, as Liu et al. 2019, arXiv:1907.11692, have it.
Your own text: --data.train 'texts/*.jsonl' --name mine
"""

from maxpretrain.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TokenizerConfig,
)
from maxpretrain.objectives import MLM

config = Run(
    name="bert-tiny",
    steps=1000,
    model=ModelConfig(
        architecture="encoder",
        num_layers=2,
        model_dim=128,
        num_heads=4,
        max_length=128,
        position="rope",
        norm_placement="pre",
        activation="gelu",
        embed_norm=True,
        lm_transform=True,
        lm_bias=True,
        init_std=0.05,
    ),
    objective=MLM(whole_word=True),
    tokenizer=TokenizerConfig(vocab_size=2048, algorithm="bpe"),
    batch=BatchConfig(size=32, length=128),
    optimizer=OptimizerConfig(peak_lr=3e-3, b2=0.98, schedule=ScheduleConfig(warmup=100, final=0.02)),
    evaluation=EvaluationConfig(every=250, prompts=("Return <mask> if the string is empty.", "The <mask> of the list")),
    checkpoint=CheckpointConfig(every=500),
)
