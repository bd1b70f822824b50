"""Prints the parameter counts of published models, counted on the reference classes. Needs torch and transformers, no jax.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python tests/golden/count_families.py

Nothing is allocated. Tied tensors count once. Buffers do not count, even those in the files: DeepSeek-V3's
e_score_correction_bias (58 layers of 256) and BART's final_logits_bias (the size of the vocabulary).
"""

import torch
import transformers

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SMALL = {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024}
DEBERTA = {"vocab_size": 128100, "type_vocab_size": 0, "relative_attention": True, "position_biased_input": False}
DEBERTA |= {
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 256,
}
SEVEN_BILLION = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
BART = {"d_model": 768}
for stack in ("encoder", "decoder"):
    BART |= {f"{stack}_layers": 6, f"{stack}_attention_heads": 12, f"{stack}_ffn_dim": 3072}

# name: class, what differs from the defaults of its config, the count that maxpretrain expects
PUBLISHED = {
    "bert-base": ("BertForPreTraining", BASE, 110_106_428),
    "bert-large": ("BertForPreTraining", LARGE, 336_226_108),
    "roberta-base": (
        "RobertaForMaskedLM",
        {**BASE, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        124_697_433,
    ),
    "albert-base-v2": ("AlbertForPreTraining", {**BASE, "vocab_size": 30000, "embedding_size": 128}, 11_813_810),
    "electra-small discriminator": ("ElectraForPreTraining", {**SMALL, "embedding_size": 128}, 13_549_057),
    "electra-base discriminator": ("ElectraForPreTraining", {**BASE, "embedding_size": 768}, 109_483_009),
    "electra-base generator": ("ElectraForMaskedLM", {**SMALL, "embedding_size": 768}, 33_740_602),
    "deberta-v3-base": ("DebertaV2ForMaskedLM", {**BASE, **DEBERTA}, 184_551_780),
    "modernbert-base": (
        "ModernBertForMaskedLM",
        {**BASE, "num_hidden_layers": 22, "intermediate_size": 1152, "vocab_size": 50368},
        149_655_232,
    ),
    "t5-small": ("T5ForConditionalGeneration", {}, 60_506_624),
    "t5-v1.1-small": (
        "T5ForConditionalGeneration",
        {
            "d_ff": 1024,
            "num_layers": 8,
            "num_heads": 6,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        76_961_152,
    ),
    "t5-base": (
        "T5ForConditionalGeneration",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        222_903_552,
    ),
    "bart-base": ("BartForConditionalGeneration", BART, 139_420_416),
    "gpt2": ("GPT2LMHeadModel", {}, 124_439_808),
    "gpt2-xl": ("GPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "llama-2-7b": ("LlamaForCausalLM", {**SEVEN_BILLION, "intermediate_size": 11008}, 6_738_415_616),
    "llama-3-8b": (
        "LlamaForCausalLM",
        {**SEVEN_BILLION, "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
        8_030_261_248,
    ),
    "qwen3-0.6b": (
        "Qwen3ForCausalLM",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "qwen3-30b-a3b": (
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
        },
        30_532_122_624,
    ),
    "gemma-3-1b": (
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 6912,
        },
        999_885_952,
    ),
    "mixtral-8x7b": (
        "MixtralForCausalLM",
        {**SEVEN_BILLION, "intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8},
        46_702_792_704,
    ),
    "olmo2-7b": (
        "Olmo2ForCausalLM",
        {**SEVEN_BILLION, "vocab_size": 100352, "intermediate_size": 11008},
        7_298_617_344,
    ),
    # the defaults of the config; the class has no MTP module
    "deepseek-v3": ("DeepseekV3ForCausalLM", {}, 671_026_404_352),
}


def count(architecture: str, settings: dict) -> int:
    model_class = getattr(transformers, architecture)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**settings))
    if settings.get("tie_word_embeddings") is False:  # T5 ties in spite of it
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    transformers.logging.set_verbosity_error()
    for name, (architecture, settings, expected) in PUBLISHED.items():
        found = count(architecture, settings)
        verdict = "" if found == expected else f"  expected {expected:,}: {found - expected:+,}"
        print(f"{name:<28} {found:>15,}{verdict}", flush=True)


if __name__ == "__main__":
    main()
