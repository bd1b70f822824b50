"""Writes families/*.npz: tiny models of the reference classes, with what they answer. Needs torch and transformers, no jax.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python tests/golden/make_families.py [NAME ...]

A file holds, in float32 unless said otherwise:

* `config`, the text of config.json, and `architecture`, the name of the reference class;
* `weights/<name>`, every tensor of the safetensors file, under the names and in the layouts of the file;
* `ids` and `mask` [B, T], `token_types` where there are any, `decoder_ids` and `decoder_mask` [B, T'];
* `labels`, -100 where nothing is asked: causal as ids (the loss shifts them), masked and token [B, T], replaced [B, T] of 0 and 1,
  sequence [B], encoder-decoder [B, T'] (not shifted); `pair_labels` [B];
* `loss`, a mean over what is asked, and `grad/<name>` of it for a few tensors, by their names in the file;
* `logits` of the vocabulary, `pair_logits`, `replaced_logits`, `sequence_logits`, `token_logits`, `pooled`, and `hidden`, the last
  hidden states as the base model returns them (`encoder_hidden` beside it).

Answers at each position are 0 where the mask is 0: what padding sees is nobody's concern.
Weights are multiples of 1/256, which compress well and lose nothing.

Some variants have norm_eps of 1e-3: the usual ones cannot be told apart within the tolerance of the comparison.
"""

import copy
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

OUT = Path(__file__).parent / "families"
SEED = 0
LENGTH, DECODER_LENGTH = 52, 24
REAL, DECODER_REAL = 41, 19  # tokens of the second row that are not padding
IGNORE = -100

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TINY = {
    **IDS,
    "vocab_size": 99,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = {**TINY, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 12}  # H·K = 48, apart from D
COARSE = {"rms_norm_eps": 1e-3}
GPT2 = {
    **IDS,
    "vocab_size": 99,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "n_inner": 40,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "summary_first_dropout": 0.0,
}
BLOOM = {**IDS, "vocab_size": 99, "hidden_size": 32, "n_head": 4, "n_layer": 2, "initializer_range": 0.2}
# 100 as the base puts one of the four frequencies in each regime of the rule
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# 10 as the base spreads the ramp over the four frequencies
YARN = {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {**WIDE, "sliding_window": 8, "query_pre_attn_scalar": 20}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA3 = {**GEMMA, "num_hidden_layers": 4, "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL]}
GEMMA3_LINEAR = {
    GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    LOCAL: {"rope_type": "default", "rope_theta": 1e4},
}
MIXTRAL = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_MOE = {**WIDE, "moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}
OLMOE = {**GROUPED, "intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3}
DEEPSEEK = {
    **TINY,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
BERT = {**TINY, **NO_DROPOUT}
LABELED = {"num_labels": 3, "classifier_dropout": 0.0}
ROBERTA = {**BERT, "max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ROBERTA |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
DISTILBERT = {"vocab_size": 99, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 40, "max_position_embeddings": 64}
DISTILBERT |= {"initializer_range": 0.2, "dropout": 0.0, "attention_dropout": 0.0}
NARROW = {**BERT, "embedding_size": 16}
DEBERTA = {
    **BERT,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 8,
    "max_relative_positions": 16,
}
# every distance has a row of its own, as far as 24
DEBERTA_C2P = {**BERT, "relative_attention": True, "pos_att_type": ["c2p"], "max_relative_positions": 24}
DEBERTA_C2P |= {"layer_norm_eps": 1e-3}
MODERNBERT = {**TINY, "num_hidden_layers": 4, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "initializer_factor": 1.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
# H·K = 48 apart from D, and distances beyond the last bucket
T5_WIDE = {**T5, "d_kv": 12, "num_decoder_layers": 3, "relative_attention_num_buckets": 8}
T5_WIDE |= {"relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-3}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "dropout": 0.0,
}

FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        {**GPT2, "n_inner": None, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ),
    "gpt2-sequence": ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3}),
    "gpt-neox": ("GPTNeoXForCausalLM", TINY),
    "gpt-neox-token": ("GPTNeoXForTokenClassification", {**TINY, **LABELED}),
    "gpt-neox-sequential": (
        "GPTNeoXForCausalLM",
        {**TINY, "use_parallel_residual": False, "rotary_pct": 0.5, "rotary_emb_base": 500.0, "layer_norm_eps": 1e-3},
    ),
    "bloom": ("BloomForCausalLM", BLOOM),
    # slopes of a number of heads that is not a power of two
    "bloom-6-heads": ("BloomForCausalLM", {**BLOOM, "hidden_size": 36, "n_head": 6, "layer_norm_epsilon": 1e-3}),
    "llama-mha": ("LlamaForCausalLM", {**TINY, "tie_word_embeddings": True}),
    "llama-gqa-llama3": ("LlamaForCausalLM", {**GROUPED, "max_position_embeddings": 256, "rope_parameters": LLAMA3}),
    "llama-bias": ("LlamaForCausalLM", {**WIDE, **COARSE, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaForCausalLM", {**GROUPED, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": (
        "LlamaForCausalLM",
        {
            **GROUPED,
            "max_position_embeddings": 128,
            "rope_parameters": {**YARN, "beta_fast": 2.0, "beta_slow": 0.5},
        },
    ),
    "llama-yarn-untruncated": (
        "LlamaForCausalLM",
        {
            **GROUPED,
            "max_position_embeddings": 128,
            "rope_parameters": {**YARN, "truncate": False, "attention_factor": 0.75},
        },
    ),
    # this rule acts beyond max_position_embeddings
    "llama-dynamic": (
        "LlamaForCausalLM",
        {**GROUPED, "max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama-sequence": ("LlamaForSequenceClassification", {**GROUPED, "num_labels": 3}),
    "llama-token": ("LlamaForTokenClassification", {**GROUPED, "num_labels": 3}),
    "mistral-window": ("MistralForCausalLM", {**GROUPED, "sliding_window": 8}),
    "mistral-full": ("MistralForCausalLM", {**WIDE, **COARSE, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2ForCausalLM", {**GROUPED, **COARSE}),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {**GROUPED, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**WIDE, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3ForCausalLM", {**WIDE, **COARSE, "attention_bias": True}),
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "num_hidden_layers": 3}),
    "gemma2-tight-caps": (
        "Gemma2ForCausalLM",
        {**GEMMA, **COARSE, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": ("Gemma3ForCausalLM", GEMMA3),
    "gemma3-linear": ("Gemma3ForCausalLM", {**GEMMA3, **COARSE, "rope_parameters": GEMMA3_LINEAR}),
    "olmo2": ("Olmo2ForCausalLM", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "olmo2-mha": ("Olmo2ForCausalLM", {**TINY, **COARSE, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", MIXTRAL),
    "mixtral-window": (
        "MixtralForCausalLM",
        {**MIXTRAL, **COARSE, "sliding_window": 8, "num_local_experts": 5, "intermediate_size": 12},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3-moe-raw": ("Qwen3MoeForCausalLM", {**QWEN3_MOE, **COARSE, "norm_topk_prob": False}),
    "qwen3-moe-dense-layer": (
        "Qwen3MoeForCausalLM",
        {**QWEN3_MOE, "num_hidden_layers": 3, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "olmoe": ("OlmoeForCausalLM", OLMOE),
    "olmoe-renormalized": ("OlmoeForCausalLM", {**OLMOE, **COARSE, "num_key_value_heads": 4, "norm_topk_prob": True}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "deepseek-v3-no-query-latent": (
        "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
    ),
    "deepseek-v3-yarn": (
        "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK,
            "max_position_embeddings": 128,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "bert-pretraining": ("BertForPreTraining", BERT),
    "bert-lm": ("BertForMaskedLM", {**BERT, "layer_norm_eps": 1e-3}),
    "bert-sequence": ("BertForSequenceClassification", {**BERT, **LABELED}),
    "bert-token": ("BertForTokenClassification", {**BERT, **LABELED}),
    "distilbert": ("DistilBertForMaskedLM", DISTILBERT),
    "roberta": ("RobertaForMaskedLM", ROBERTA),
    "roberta-sequence": ("RobertaForSequenceClassification", {**ROBERTA, **LABELED}),
    "roberta-token": ("RobertaForTokenClassification", {**ROBERTA, **LABELED, "layer_norm_eps": 1e-3}),
    "albert": ("AlbertForPreTraining", NARROW),
    "albert-groups": (
        "AlbertForPreTraining",
        {**NARROW, "num_hidden_layers": 4, "num_hidden_groups": 2, "layer_norm_eps": 1e-3},
    ),
    "electra-discriminator": ("ElectraForPreTraining", NARROW),
    "electra-generator": ("ElectraForMaskedLM", NARROW),
    "electra-same-width": ("ElectraForPreTraining", {**BERT, "embedding_size": 32, "layer_norm_eps": 1e-3}),
    "deberta-v2": ("DebertaV2ForMaskedLM", DEBERTA),
    "deberta-v2-c2p": ("DebertaV2ForMaskedLM", DEBERTA_C2P),
    # the names that the head has in the published files of version 3
    "deberta-v2-lm-head": ("DebertaV2ForMaskedLM", {**DEBERTA, "legacy": False, "share_att_key": False}),
    "modernbert": ("ModernBertForMaskedLM", MODERNBERT),
    "modernbert-bias": (
        "ModernBertForMaskedLM",
        {**MODERNBERT, "attention_bias": True, "mlp_bias": True, "norm_bias": True, "norm_eps": 1e-3},
    ),
    "modernbert-sequence": (
        "ModernBertForSequenceClassification",
        {**MODERNBERT, **LABELED, "classifier_pooling": "mean"},
    ),
    "modernbert-token": ("ModernBertForTokenClassification", {**MODERNBERT, **LABELED, "classifier_bias": True}),
    "t5-sequence": ("T5ForSequenceClassification", {**T5, **LABELED, "feed_forward_proj": "relu"}),
    "t5-v1.0": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "relu"}),
    "t5-v1.1": (
        "T5ForConditionalGeneration",
        {**T5_WIDE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "umt5": ("UMT5ForConditionalGeneration", T5),
    "umt5-wide": ("UMT5ForConditionalGeneration", T5_WIDE),
    "bart": ("BartForConditionalGeneration", BART),
    "bart-sequence": ("BartForSequenceClassification", {**BART, **LABELED}),
    "bart-scaled": ("BartForConditionalGeneration", {**BART, "decoder_layers": 3, "scale_embedding": True}),
}

# these classes tie whatever the config says, unless the file has a head that differs
UNTIED = ("t5-v1.1", "mt5", "umt5", "umt5-wide")

# the first parameter that matches each of these has its gradient in the file, beside the word embedding
GRADIENTS = (
    r"\.(q_proj|query|query_proj|q_lin|q_b_proj|c_attn|query_key_value|Wqkv|SelfAttention\.q)\.weight$",
    r"\.0\..*(norm|LayerNorm|ln_1)\.weight$",
    r"(EncDecAttention\.k|encoder_attn\.k_proj)\.weight$",
    r"(relative_attention_bias|rel_embeddings)\.weight$",
    r"mlp\.gate\.weight$",
)


def build(name: str, rng: np.random.Generator) -> torch.nn.Module:
    """The model of a row of FAMILIES, all of its parameters and saved buffers drawn anew."""
    architecture, settings = FAMILIES[name]
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**copy.deepcopy(settings))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).eval()
    if name in UNTIED:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    norm_mean = 0.0 if config.model_type.startswith("gemma") else 1.0
    drawn = set()
    for key, tensor in model.state_dict().items():
        if tensor.data_ptr() in drawn:  # tied to another
            continue
        drawn.add(tensor.data_ptr())
        values = 0.2 * rng.standard_normal(tuple(tensor.shape))
        if key.endswith("Attention.q.weight"):  # T5, which does not divide by √K
            values /= 4
        if tensor.ndim == 1 and key.endswith(".weight"):
            values += norm_mean
        tensor.copy_(torch.from_numpy(np.round(256 * values) / 256))
    return model


def inputs(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two rows of tokens, the second padded, with what the task asks of them. Names as in the file."""
    config, task = model.config, type(model).__name__
    vocab = config.vocab_size

    def padded(length: int, real: int) -> np.ndarray:
        return np.stack([np.arange(length) < length, np.arange(length) < real])

    def draw(mask: np.ndarray, low: int = 5, high: int = vocab, fill: int = IGNORE) -> np.ndarray:
        return np.where(mask, rng.integers(low, high, mask.shape), fill)

    mask = padded(LENGTH, REAL)
    values = {"ids": draw(mask, fill=config.pad_token_id or 0), "mask": mask.astype(np.int64)}
    if getattr(config, "type_vocab_size", 0) == 2:
        values["token_types"] = np.tile(np.arange(LENGTH) >= 20, (2, 1)).astype(np.int64)
    positions = np.arange(LENGTH)
    if config.is_encoder_decoder and task.endswith("SequenceClassification"):
        # These classes take the decoder's state where the encoder's tokens have eos.
        values["ids"][np.arange(2), mask.sum(1) - 1] = config.eos_token_id
        start = np.full((2, 1), config.decoder_start_token_id)
        values["decoder_ids"] = np.concatenate([start, values["ids"][:, :-1]], 1)
        values |= {"decoder_mask": mask.astype(np.int64), "labels": rng.integers(0, config.num_labels, 2)}
    elif config.is_encoder_decoder:
        mask = padded(DECODER_LENGTH, DECODER_REAL)
        values["labels"] = draw(mask)
        shifted = model.prepare_decoder_input_ids_from_labels(torch.from_numpy(values["labels"]))
        values |= {"decoder_ids": shifted.numpy(), "decoder_mask": mask.astype(np.int64)}
    elif task.endswith("SequenceClassification"):
        values["labels"] = rng.integers(0, config.num_labels, 2)
    elif task.endswith("TokenClassification"):
        values["labels"] = draw(mask & (positions % 4 != 0), 0, config.num_labels)
    elif task == "ElectraForPreTraining":
        values["labels"] = draw(mask, 0, 2)
    elif task.endswith(("ForMaskedLM", "ForPreTraining")):
        values["labels"] = draw(mask & (positions % 5 == 3))
    else:
        values["labels"] = np.where(mask, values["ids"], IGNORE)
    if task.endswith("ForPreTraining") and task != "ElectraForPreTraining":
        values["pair_labels"] = np.array([1, 0])
    return values


def outputs(model: torch.nn.Module, values: dict[str, np.ndarray]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and what else the model answers. Names as in the file."""
    task = type(model).__name__
    tensors = {key: torch.from_numpy(value) for key, value in values.items()}
    names = {"ids": "input_ids", "mask": "attention_mask", "token_types": "token_type_ids"}
    names |= {"decoder_ids": "decoder_input_ids", "decoder_mask": "decoder_attention_mask", "labels": "labels"}
    names["pair_labels"] = "sentence_order_label" if task == "AlbertForPreTraining" else "next_sentence_label"
    arguments = {names[key]: tensor for key, tensor in tensors.items()}
    answer = model(**arguments, output_hidden_states=True)
    if model.config.is_encoder_decoder:
        logits, hidden = answer.logits, answer.decoder_hidden_states[-1]
        kind = "sequence_logits" if task.endswith("SequenceClassification") else "logits"
        return answer.loss, {kind: logits, "hidden": hidden, "encoder_hidden": answer.encoder_last_hidden_state}
    base = model.base_model(**{key: value for key, value in arguments.items() if "label" not in key})
    found = {"hidden": base.last_hidden_state}
    if getattr(base, "pooler_output", None) is not None:
        found["pooled"] = base.pooler_output
    if task == "ElectraForPreTraining":
        return answer.loss, found | {"replaced_logits": answer.logits}
    if task.endswith("ForPreTraining"):
        pair = answer.sop_logits if task == "AlbertForPreTraining" else answer.seq_relationship_logits
        return answer.loss, found | {"logits": answer.prediction_logits, "pair_logits": pair}
    for ending, kind in (("SequenceClassification", "sequence_logits"), ("TokenClassification", "token_logits")):
        if task.endswith(ending):
            return answer.loss, found | {kind: answer.logits}
    return answer.loss, found | {"logits": answer.logits}


def without_padding(found: dict[str, torch.Tensor], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = {}
    for key, tensor in found.items():
        array = tensor.detach().numpy()
        decoder = "decoder_mask" in values and key != "encoder_hidden"
        mask = values["decoder_mask" if decoder else "mask"]
        if array.shape[:2] == mask.shape:
            array = np.where(mask.reshape(mask.shape + (1,) * (array.ndim - 2)), array, 0)
        kept[key] = array
    return kept


def results(
    model: torch.nn.Module, values: dict[str, np.ndarray], weights: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What the model answers, the loss, and gradients of some tensors by their names in the file."""
    loss, found = outputs(model, values)
    arrays = {**without_padding(found, values), "loss": loss.detach().numpy()}
    parameters = dict(model.named_parameters())
    chosen = [model.get_input_embeddings().weight]
    for pattern in GRADIENTS:
        chosen += [value for key, value in parameters.items() if re.search(pattern, key)][:1]
    for value, gradient in zip(chosen, torch.autograd.grad(loss, chosen), strict=True):
        # the class may have another name for it than the file, but not other values
        name = next(key for key, saved in weights.items() if np.array_equal(saved, value.detach().numpy()))
        arrays[f"grad/{name}"] = gradient.numpy()
    return arrays


def difference(arrays: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(array - others[key]).max()) for key, array in arrays.items())


def full_precision_softmax(scores: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.softmax(scores, dim)


def golden(name: str) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of a file, and the greatest rounding error among the results of the reference class."""
    rng = np.random.default_rng([SEED, *name.encode()])
    model = build(name, rng)
    values = inputs(model, rng)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config, weights = (Path(folder) / "config.json").read_text(), load_file(f"{folder}/model.safetensors")
        again, report = type(model).from_pretrained(
            folder, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
        )
    found = results(model, values, weights)
    if any(report.values()) or difference(found, results(again.eval(), values, weights)) > 1e-6:
        raise AssertionError(f"{name}: the reference class does not read its own file: {report}")
    # classes ask for softmax in float32 by name, in which the float64 mask is -inf: nan where a window has only padding
    with mock.patch("torch.nn.functional.softmax", full_precision_softmax):
        error = difference(results(copy.deepcopy(model).double(), values, weights), found)
    arrays = {"config": np.array(config), "architecture": np.array(type(model).__name__)}
    arrays |= {f"weights/{key}": array for key, array in weights.items()}
    return arrays | {key: array.astype(np.int32) for key, array in values.items()} | found, error


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    OUT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or FAMILIES:
        arrays, error = golden(name)
        # the comparison has a tolerance of 2e-5, of which the reference itself must leave enough
        if not error < 1e-5:
            raise AssertionError(f"{name}: the results of the reference are rounded by {error:.1e}")
        np.savez_compressed(OUT / f"{name}.npz", **arrays)
        size = (OUT / f"{name}.npz").stat().st_size
        print(f"{name:<28} {size / 1000:6.1f} kB  loss {arrays['loss']:.6f}  rounding {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
