"""Very small models of transformers, by the names of their classes; nothing is downloaded."""

from __future__ import annotations

from typing import Any

_SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}

# Class of the model, class of its config, what the config is made from.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 40, "n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 40, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 8},
    ),
    "GPTNeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SIZES, "num_attention_heads": 2}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, **_HEADS}),
    "Llama, tied": ("LlamaForCausalLM", "LlamaConfig", {**_SIZES, **_HEADS, "tie_word_embeddings": True}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_SIZES, **_HEADS, "num_local_experts": 8}),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_SIZES, **_HEADS, "moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8},
    ),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", {**_SIZES, **_HEADS, "num_local_experts": 8, "head_dim": 8}),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", {**_SIZES, **_HEADS, "pad_token_id": 0}),
    "BERT": ("BertForMaskedLM", "BertConfig", {**_SIZES, "num_attention_heads": 2}),
    "Whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 40,
            "d_model": 16,
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "max_source_positions": 24,
            "max_target_positions": 24,
        },
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **_SIZES,
            "num_attention_heads": 2,
            "conv_dim": (8, 8),
            "conv_stride": (2, 2),
            "conv_kernel": (3, 3),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
}


def build(name: str) -> Any:
    """One of the models, with weights that are always the same."""
    import torch
    import transformers

    model, config, sizes = CONFIGS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))
