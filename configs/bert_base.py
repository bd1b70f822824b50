"""BERT base, 110 M parameters: masked language modelling and next sentences.

    maxpretrain train configs/bert_base.py --data.train 'text/*.parquet' --tokenizer.path tokenizer.json

Hardware: a v3-32 or 8 × A100 and up; fewer devices take the batch in parts: --batch.microbatches 8.
Hours: `maxpretrain plan bert_base --target v5e-32` tells for yours. Expected loss: not measured here.
Paper: Devlin et al. 2018, arXiv:1810.04805, appendix A.2: a million steps of 256 sequences, Adam at 1e-4 with linear decay. It trains
90 % of the steps at length 128, which is `--batch.length 128 --steps 900000`, then --init-from that run at length 512.
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
from maxpretrain.models.families.bert import PRESETS
from maxpretrain.objectives import MLM

config = Run(
    name="bert-base",
    steps=1_000_000,
    model=PRESETS["bert-base"],
    objective=MLM(pair="nsp"),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("text/*.parquet",), validation_fraction=0.0005),
    batch=BatchConfig(size=256, length=512),
    optimizer=OptimizerConfig(
        peak_lr=1e-4,
        b2=0.999,
        eps=1e-6,
        weight_decay=0.01,
        schedule=ScheduleConfig(shape="linear", warmup=10_000, final=0.0),
    ),
    evaluation=EvaluationConfig(every=5000, windows=10_240, prompts=()),
    checkpoint=CheckpointConfig(every=5000),
)
