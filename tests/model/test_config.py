"""Configurations: what a file leaves out comes from its release or is asked for; what it adds is refused by name."""

import json
import random

import pytest
import transformers

from model.config import LlamaConfig
from model.errors import UserError
from model.rope_scaling import RopeScaling

LLAMA3 = {
    "vocab_size": 128256,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "n_kv_heads": 8,
}
# params.json as Meta's releases have it -> (intermediate_size, rope factor, context) of the same model at Hugging Face
RELEASES = {
    "LLaMA 7B": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
        (11008, None, 2048),
    ),
    "Llama 2 70B": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80}
        | {"norm_eps": 1e-05, "vocab_size": -1},
        (28672, None, 2048),  # its file does not tell it from LLaMA 65B's generation
    ),
    "Code Llama 7B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.0}
        | {"norm_eps": 1e-5, "rope_theta": 1000000},
        (11008, None, 16384),
    ),
    "Llama 3 8B": (
        LLAMA3 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}
        | {"use_scaled_rope": False},
        (14336, None, 8192),
    ),
    "Llama 3.1 8B": (
        LLAMA3 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
        (14336, 8.0, 131072),
    ),
    "Llama 3.1 and 3.3 70B": (
        LLAMA3 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        (28672, 8.0, 131072),
    ),
    "Llama 3.1 405B": (
        LLAMA3 | {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2},
        (53248, 8.0, 131072),
    ),
    "Llama 3.2 1B": (
        LLAMA3 | {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5},
        (8192, 32.0, 131072),
    ),
    "Llama 3.2 3B": (
        LLAMA3 | {"dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0},
        (8192, 32.0, 131072),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASES)
def test_metas_releases(name):
    params, (intermediate_size, factor, context) = RELEASES[name]
    is_llama3 = params.get("vocab_size") == 128256
    config = LlamaConfig.from_meta(params, 128256 if is_llama3 else 32000)
    assert (config.intermediate_size, config.max_seq_len) == (intermediate_size, context)
    assert config.rope_scaling == (None if factor is None else RopeScaling("llama3", factor))
    assert config.rope_theta == params.get("rope_theta", 10000.0)
    assert (config.bos_id, config.eos_ids) == ((128000, (128001, 128008, 128009)) if is_llama3 else (1, (2,)))


def meta(rows=32000, **changes):
    return LlamaConfig.from_meta({"dim": 64, "n_layers": 2, "n_heads": 4} | changes, rows)


def test_a_factor_that_no_release_tells_is_asked_for():
    with pytest.raises(
        UserError, match="dim 64 with 2 layers is none of Meta's releases: add rope_scaling_factor"
    ):
        meta(use_scaled_rope=True)
    assert meta(use_scaled_rope=True, rope_scaling_factor=16).rope_scaling == RopeScaling("llama3", 16.0)
    assert (
        meta(
            use_scaled_rope=True, rope_scaling_factor=16, rope_high_freq_factor=2
        ).rope_scaling.high_freq_factor
        == 2
    )
    assert meta(use_scaled_rope=False, rope_scaling_factor=16).rope_scaling is None
    with pytest.raises(UserError, match="a rope_scaling_factor and no use_scaled_rope"):
        meta(rope_scaling_factor=16)


def test_what_metas_files_leave_out_follows_the_vocabulary():
    """Tokens that were added to Llama 3 leave it a Llama 3: its id 2 is a quote, and ends nothing."""
    for vocab_size in (128256, 128257, 128264):
        config = meta(vocab_size)
        assert (config.rope_theta, config.max_seq_len, config.bos_id) == (500000.0, 8192, 128000)
        assert 2 not in config.eos_ids
    assert (meta(32001).rope_theta, meta(32001).eos_ids) == (10000.0, (2,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_qk_norm": True}, "params.json says use_qk_norm = True, which is not supported"),
        ({"sliding_window": 4096}, "params.json says sliding_window = 4096"),
        ({"hidden_dim": 14336}, "params.json says hidden_dim = 14336"),
        ({"attention_chunk_size": 8192}, "params.json says attention_chunk_size = 8192"),
        ({"nope_layer_interval": 4}, "says nope_layer_interval = 4"),
        ({"lora_args": {"rank": 16}}, "says lora_args = {'rank': 16}"),
        ({"quantization_args": {"scheme": "int4"}}, "quantised weights"),
        ({"moe_args": {"num_experts": 16}}, "mixture of experts"),
        ({"vision_args": {"dim": 1}}, "vision model"),
        ({"vision_chunk_size": 448}, "vision model"),
        ({"vision_num_cross_attention_layers": 8}, "says vision_num_cross_attention_layers = 8"),
        ({"use_scaled_rope": "no"}, "must have true or false as use_scaled_rope, it has 'no'"),
        ({"vocab_size": "x"}, "says vocab_size 'x', tok_embeddings.weight has 32000 rows"),
        ({"dim": 10**12}, r"a number below 2\*\*31 as dim"),
        ({"n_layers": True}, "as n_layers, it has True"),
        ({"norm_eps": float("nan")}, "as norm_eps, it has nan"),
        ({"ffn_dim_multiplier": 1e299}, r"intermediate_size must be a positive whole number below 2\*\*31"),
        ({"\x1b[31m": 1}, r"says \\x1b\[31m = 1"),
    ],
)
def test_params_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as raised:
        meta(**changes)
    assert str(raised.value).isprintable()


def test_params_that_change_nothing():
    harmless = {"max_batch_size": 32, "vision_chunk_size": -1, "vision_max_num_chunks": 4, "moe_args": None}
    harmless |= {
        "use_qk_norm": False,
        "vision_num_cross_attention_layers": -1,
        "attn_temperature_tuning": False,
    }
    assert meta(**harmless, n_kv_heads=None, head_dim=None, lora_args=None, quantization_args=None) == meta()


HF = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "sliding_window": 16, "bos_token_id": 3,
    "eos_token_id": [4, 5], "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = [
    None, {}, {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 3}, LLAMA3_ROPE,
    LLAMA3_ROPE | {"original_max_position_embeddings": 128}, {"rope_type": "default", "rope_theta": 777.0},
    {"rope_theta": 888.0}, {"rope_type": "linear", "factor": 2.0, "type": "llama3"},
]  # fmt: skip


def test_what_a_file_does_not_say_is_what_transformers_assumes():
    """600 files with fields left out: those that are read mean what they mean to transformers."""
    chance, read = random.Random(0), 0
    for _ in range(600):
        content = HF | {"model_type": chance.choice(["llama", "mistral"])}
        for name in chance.sample(list(HF)[1:], chance.randint(0, 5)):
            del content[name]
        if chance.random() < 0.3:
            content[chance.choice(["num_key_value_heads", "head_dim", "eos_token_id", "bos_token_id"])] = None
        for name in ("rope_scaling", "rope_parameters"):
            if chance.random() < 0.4:
                content[name] = chance.choice(ROPES)
        try:
            ours = LlamaConfig.from_hf(json.loads(json.dumps(content)))
        except UserError:
            continue
        if content["model_type"] == "mistral" and content.get("num_key_value_heads", 8) is None:
            continue  # transformers 5 refuses it
        theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(content)))
        read += 1
        same = {
            "num_heads_kv": theirs.num_key_value_heads, "head_dim": theirs.head_dim, "norm_eps": theirs.rms_norm_eps,
            "max_seq_len": theirs.max_position_embeddings, "tie_embeddings": theirs.tie_word_embeddings,
            "bos_id": theirs.bos_token_id, "rope_theta": theirs.rope_parameters["rope_theta"],
            "sliding_window": theirs.sliding_window if theirs.model_type == "mistral" else None,
        }  # fmt: skip
        assert {name: getattr(ours, name) for name in same} == same, content
        eos = theirs.eos_token_id
        assert ours.eos_ids == (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
        kind = theirs.rope_parameters["rope_type"]
        assert kind == ("default" if ours.rope_scaling is None else ours.rope_scaling.kind)
        if ours.rope_scaling is not None:
            assert ours.rope_scaling.factor == theirs.rope_parameters["factor"]
    assert read > 150


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "config.json says qk_norm = True, which is not supported"),
        ({"logits_soft_cap": 30.0}, "says logits_soft_cap = 30.0"),
        ({"embedding_multiplier": 12}, "says embedding_multiplier = 12"),
        ({"rope_interleaved": True}, "says rope_interleaved = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "says layer_types = "),
        ({"num_local_experts": 8}, "says num_local_experts = 8"),
        ({"vision_config": {"hidden_size": 8}}, "says vision_config"),
        ({"compression_config": {"format": "int"}}, "says compression_config"),
        ({"tie_word_embeddings": "no"}, "must have true or false as tie_word_embeddings, it has 'no'"),
        ({"tie_word_embeddings": 0}, "must have true or false as tie_word_embeddings, it has 0"),
        ({"attention_bias": "false"}, "attention_bias = 'false', only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', only 'silu'"),
        ({"eos_token_id": True}, "a whole number as eos_token_id, or a list of them, it has True"),
        ({"eos_token_id": [2, "x"]}, "as eos_token_id"),
        ({"bos_token_id": 1.5}, "as bos_token_id"),
        ({"partial_rotary_factor": 0.5}, "only a part of each head"),
        ({"rope_scaling": {"factor": 2.0}}, "a factor of the rotary embedding and no rope_type"),
        ({"rope_scaling": LLAMA3_ROPE | {"beta_fast": 32}}, "rotary embedding says beta_fast = 32"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "says full_attention"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor above"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"type": "linear", "factor": 4},
            },
            "describes the rotary embedding twice",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2}},
            "rope_type 'default' and type 'linear'",
        ),
        ({"rms_norm_eps": 10**300 * 10}, "as rms_norm_eps"),
        ({"rms_norm_eps": [[[[[[[["x"]]]]]]]]}, r"as rms_norm_eps, it has \[\[\[\[\.\.\."),
        ({"vocab_size": 100.0}, "as vocab_size, it has 100.0"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as raised:
        LlamaConfig.from_hf(HF | changes)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500


def test_fields_that_change_nothing():
    """SmolLM2's file, fields of fine-tuning programs, and all that transformers writes for generation."""
    harmless = {
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "quantization_config": None,
    }
    harmless |= {
        "transformers.js_config": {"dtype": "q4"},
        "unsloth_fixed": True,
        "pretraining_tp": 1,
        "_anything": 3,
    }
    harmless |= {
        "qk_norm": False,
        "logits_soft_cap": None,
        "num_local_experts": 0,
        "layer_types": [],
        "prefix": "",
    }
    harmless |= {
        "attention_dropout": 0.1,
        "attention_bias": None,
        "tie_word_embeddings": True,
        "hidden_act": "swish",
    }
    harmless |= transformers.GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True).to_dict()
    harmless |= {"bos_token_id": 3, "eos_token_id": [4, 5]}
    assert LlamaConfig.from_hf(HF | harmless) == LlamaConfig.from_hf(HF)
    for architecture in ("llama", "mistral"):
        written = transformers.AutoConfig.for_model(
            architecture, **{"num_attention_heads": 8, "hidden_size": 64}
        )
        LlamaConfig.from_hf(written.to_dict())
        LlamaConfig.from_hf(json.loads(written.to_json_string(use_diff=False)))


def test_generation_config_names_the_ends_if_it_has_them():
    assert LlamaConfig.from_hf(HF, {"eos_token_id": 7}).eos_ids == (7,)
    assert LlamaConfig.from_hf(HF, {}).eos_ids == (4, 5)
    with pytest.raises(UserError, match="generation_config.json must have a whole number as eos_token_id"):
        LlamaConfig.from_hf(HF, {"eos_token_id": "x"})
