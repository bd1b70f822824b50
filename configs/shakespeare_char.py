"""The well-known character-level run: a GPT of 0.8 M parameters on tiny Shakespeare (1,115,394 characters, 65 distinct).

    maxpretrain train configs/shakespeare_char.py --data.train tinyshakespeare.txt

Hardware: two CPU cores, about two minutes.
Expected: 1.78 nats per character over the whole validation part (the last 10 % of the text); 1.91 from the original's initial
weights (--model.init-std 0.02), whose own checkpoint gives 1.90.
On eight simulated devices: --compute.cpu-devices 8 --mesh.data 4 --mesh.tensor 2 --model.vocab-size 66 (65 is odd).
"""

from maxpretrain.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    ScheduleConfig,
    TokenizerConfig,
)
from maxpretrain.objectives import CLM

config = Run(
    name="shakespeare-char",
    steps=2000,
    model=ModelConfig(
        num_layers=4,
        model_dim=128,
        num_heads=4,
        max_length=64,
        position="learned",
        norm="layernorm",
        activation="gelu_tanh",
        bias=False,
        init_std=0.04,
    ),
    objective=CLM(mask_documents=False),
    tokenizer=TokenizerConfig(kind="characters"),
    data=DataConfig(train=("tinyshakespeare.txt",), split="tail", validation_fraction=0.1),
    batch=BatchConfig(size=12, length=64),
    optimizer=OptimizerConfig(
        peak_lr=1e-3, b2=0.99, weight_decay=0.1, schedule=ScheduleConfig(shape="cosine", warmup=100, final=0.1)
    ),
    evaluation=EvaluationConfig(every=500, prompts=("\n",), sample_tokens=200),
    checkpoint=CheckpointConfig(every=500),
)
