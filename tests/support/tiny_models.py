"""Tiny models of the three shapes, written by transformers; Meta's directories and tokenizers made beside
them.
"""

import json

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
SHAPE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.12,
}
KINDS = ("llama", "linear", "llama3", "mistral")


def hf_model(kind, seed=0, **changes):
    """A transformers model with norms away from 1."""
    torch.manual_seed(seed)
    options = {
        "llama": {},
        "linear": {"rope_parameters": LINEAR_ROPE, "head_dim": 16},
        "llama3": {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
        "mistral": {"num_key_value_heads": 2, "sliding_window": 7},
    }[kind]
    family = transformers.MistralConfig if kind == "mistral" else transformers.LlamaConfig
    model = transformers.AutoModelForCausalLM.from_config(family(**SHAPE | options | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def hf_directory(path, kind="llama", shard_size="5GB", **changes):
    """Writes the model by save_pretrained and returns it."""
    model = hf_model(kind, **changes)
    model.save_pretrained(path, max_shard_size=shard_size)
    return model


_META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def meta_directory(path, model, num_shards=1, vocab_dim=1):
    """Writes a transformers LLaMA as Meta would: other names, interleaved rotary pairs, sharded by rows or
    columns.
    """
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    shards = [{"rope.freqs": torch.ones(head_dim // 2)} for _ in range(num_shards)]
    for name, weight in model.state_dict().items():
        ours = name.removeprefix("model.")
        for hf, meta in _META_NAMES.items():
            ours = ours.replace(hf, meta)
        if "attention.wq" in ours or "attention.wk" in ours:
            weight = weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if weight.dim() == 1:
            parts = [weight] * num_shards
        else:
            by_column = ".wo." in ours or ".w2." in ours or (ours.startswith("tok") and vocab_dim == 1)
            parts = weight.chunk(num_shards, 1 if by_column else 0)
        for shard, part in zip(shards, parts, strict=True):
            shard[ours] = part.clone()
    path.mkdir(exist_ok=True)
    for index, shard in enumerate(shards):
        torch.save(shard, path / f"consolidated.{index:02d}.pth")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "multiple_of": config.intermediate_size,
        "ffn_dim_multiplier": 0.5,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }
    (path / "params.json").write_text(json.dumps(params))


def word_tokenizer(path, vocab_size=160):
    """A tokenizer.json of bytes and words with <s> and </s>, decoding back to its text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 100 if vocab_size < 300 else None]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog. " * 20], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    return tokenizer


def prompts(lengths, vocab_size=160, seed=1):
    """Random token ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]


def pack(sequences):
    """[total] tokens and cu_seqlens."""
    lengths = torch.tensor([0, *map(len, sequences)])
    return torch.cat(sequences), lengths.cumsum(0).int()
