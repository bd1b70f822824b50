"""The exported files as the reference library reads them. Needs torch and transformers, which nothing else here does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxpretrain.convert.exporting import compare, main_output, sample_inputs
from maxpretrain.errors import StorageError


def compare_reference(directory: Path, class_name: str, model: Any, params: Any) -> dict[str, float]:
    """Loads the directory with its class and compares what both say of random tokens.

    Raises:
        StorageError: the class finds a tensor missing or unexpected.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    reference, info = getattr(transformers, class_name).from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise StorageError(f"{class_name} reads the export with {kind.replace('_', ' ')}: {list(info[kind])[:3]}")
    inputs = sample_inputs(model.config)
    if model.config.architecture == "encoder-decoder" and "sequence" in model.config.heads:
        # These classes take the decoder's state from where the encoder's tokens have eos: once, and last.
        eos = reference.config.eos_token_id
        tokens = np.array(inputs["tokens"])
        tokens[tokens == eos] = eos - 1
        tokens[:, -1] = eos
        inputs["tokens"] = jax.numpy.asarray(tokens)
    names = {"tokens": "input_ids", "decoder_tokens": "decoder_input_ids"}
    tensors = {names[n]: torch.from_numpy(np.asarray(v, np.int64)) for n, v in inputs.items()}
    reference.eval()
    with torch.no_grad():  # row by row: some classes take no batch where no padding is named
        rows = [reference(**{n: v[i : i + 1] for n, v in tensors.items()}) for i in range(len(inputs["tokens"]))]
    found = ("prediction_logits", "logits", "last_hidden_state")
    scores = torch.cat([next(row[key] for key in found if key in row) for row in rows])
    ours = jax.jit(lambda p: main_output(model, p, inputs))(params)
    return compare(np.asarray(ours), scores.numpy())
