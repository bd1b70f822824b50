"""GPT-2 124M on your own text: half a million tokens a step, as the published reproductions have it.

    maxpretrain train configs/gpt2_124m.py --data.train 'openwebtext/*.jsonl.gz' --tokenizer.path tokenizer.json

Hardware: one GPU of 80 GB, or a node of eight (the batch is cut over what is there); ten billion tokens.
Hours: `maxpretrain plan gpt2_124m --target h100 --mfu 0.4` tells for yours.
Expected: about 3.28 nats per token on FineWeb validation text with GPT-2's tokenizer, as others report for 10 B tokens.
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
from maxpretrain.models.families.gpt2 import PRESETS
from maxpretrain.objectives import CLM

config = Run(
    name="gpt2-124m",
    steps=19_073,
    model=PRESETS["gpt2"],
    objective=CLM(mask_documents=False),
    tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
    data=DataConfig(train=("openwebtext/*.jsonl.gz",), validation_fraction=0.002),
    batch=BatchConfig(size=512, length=1024, microbatches=8),
    optimizer=OptimizerConfig(peak_lr=6e-4, b2=0.95, weight_decay=0.1, schedule=ScheduleConfig(warmup=700, final=0.1)),
    evaluation=EvaluationConfig(every=500, windows=10_240),
    checkpoint=CheckpointConfig(every=1000),
)
