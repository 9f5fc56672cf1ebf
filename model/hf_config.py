"""config.json of Hugging Face's transformers, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from zinit_kernels.console import shown

from .errors import UserError
from .fields import flag, number, refuse_unknown, token_ids
from .rope_scaling import rope_of_hf

# What transformers assumes if a file does not say, by architecture. None: as many key/value heads as query heads
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
ARCHITECTURES = tuple(DEFAULTS)
_READ = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "partial_rotary_factor", "original_max_position_embeddings", "max_position_embeddings", "tie_word_embeddings",
    "sliding_window", "bos_token_id", "eos_token_id", "attention_bias", "mlp_bias", "hidden_act", "quantization_config",
)  # fmt: skip
# Fields that change nothing the frozen network computes
_HARMLESS = (
    # how it is stored and by what it was written
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "transformers.js_config",
    "name_or_path", "tokenizer_class", "is_llama_config", "unsloth_version", "unsloth_fixed", "model_name",
    # how it is trained
    "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop",
    "classifier_dropout", "initializer_range", "gradient_checkpointing", "pretraining_tp", "use_bfloat16",
    # what is returned and how it is computed
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "torchscript",
    "attn_implementation", "keys_to_ignore_at_inference", "is_decoder", "max_sequence_length", "model_max_length",
    # how other architectures describe windows; transformers reads these for neither of the two
    "use_sliding_window", "max_window_layers",
    # tokens that only a tokenizer knows, and heads for other tasks
    "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "prefix",
    # how text is generated, as old versions kept it here
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "top_k",
    "top_p", "typical_p",
)  # fmt: skip


def read_hf_config(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`LlamaConfig`'s fields from a parsed config.json, and generation_config.json if there is one.

    The end-of-sequence ids are those of generation_config.json if it has them. Raises UserError.
    """
    file, architecture = "config.json", config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"config.json says model_type {shown(architecture)}, supported are {' and '.join(ARCHITECTURES)}."
        )
    for name, supported in (
        ("attention_bias", (False,)),
        ("mlp_bias", (False,)),
        ("hidden_act", ("silu", "swish")),
    ):
        value = config.get(name)
        if value is not None and value not in supported:
            raise UserError(f"config.json says {name} = {shown(value)}, only {supported[0]!r} is supported.")
    refuse_unknown(config, file, (*_READ, *_HARMLESS))
    config = DEFAULTS[architecture] | config
    read = partial(number, config, file)
    num_heads_q, hidden_size = read("num_attention_heads", int), read("hidden_size", int)
    max_seq_len = read("max_position_embeddings", int)
    rope_theta, rope_scaling = rope_of_hf(config, max_seq_len)
    eos_ids = token_ids(config, file, "eos_token_id", 2)
    if generation is not None and "eos_token_id" in generation:
        eos_ids = token_ids(generation, "generation_config.json", "eos_token_id", None)
    windowed = architecture == "mistral" and config["sliding_window"] is not None
    return {
        "vocab_size": read("vocab_size", int),
        "hidden_size": hidden_size,
        "intermediate_size": read("intermediate_size", int),
        "num_layers": read("num_hidden_layers", int),
        "num_heads_q": num_heads_q,
        "num_heads_kv": read("num_key_value_heads", int, num_heads_q),
        "head_dim": read("head_dim", int, hidden_size // num_heads_q),
        "norm_eps": read("rms_norm_eps", float, 1e-6),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "max_seq_len": max_seq_len,
        "tie_embeddings": flag(config, file, "tie_word_embeddings"),
        "sliding_window": read("sliding_window", int) if windowed else None,
        "bos_id": next(iter(token_ids(config, file, "bos_token_id", 1)), None),
        "eos_ids": eos_ids,
    }
