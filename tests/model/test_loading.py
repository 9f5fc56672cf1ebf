"""Checkpoints: logits are transformers', Meta's directories are Hugging Face's, and every bad file is one
sentence.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from full_disk import fill_at
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, hf_directory, hf_model, meta_directory, pack, prompts
from tiny_runs import contents, make_base

from model.config import AdapterConfig, LlamaConfig
from model.errors import UserError
from model.loading import load_base, save_base


def logits_of(hf, tokens):
    with torch.no_grad():
        return hf(tokens).logits


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(tmp_path, kind, shard_size):
    hf = hf_directory(tmp_path, kind, shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "60KB")
    model = load_base(tmp_path).freeze()
    tokens = torch.stack(prompts([40, 40]))
    expected = logits_of(hf, tokens)
    assert expected.abs().max() > 1
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)
    packed, cu_seqlens = pack(prompts([40, 1, 13, 40]))
    expected = torch.cat([logits_of(hf, sequence[None])[0] for sequence in prompts([40, 1, 13, 40])])
    torch.testing.assert_close(model(packed, cu_seqlens=cu_seqlens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_the_files_unless_told(tmp_path, dtype):
    hf = hf_model("llama").to(dtype)
    hf.save_pretrained(tmp_path)
    assert {p.dtype for p in load_base(tmp_path).parameters()} == {dtype}
    model = load_base(tmp_path, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.norm.weight, hf.model.norm.weight.float())


def test_parameters_are_the_mapped_file(tmp_path):
    """No copy: all parameters lie in one mapping of the file, at the file's offsets."""
    hf_directory(tmp_path)
    model = load_base(tmp_path)
    addresses = sorted((p.data_ptr(), p.numel() * p.element_size()) for p in model.parameters())
    span = addresses[-1][0] + addresses[-1][1] - addresses[0][0]
    assert span <= (tmp_path / "model.safetensors").stat().st_size
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = next(line for line in maps if line.endswith(str(tmp_path / "model.safetensors")))
    low, high = (int(edge, 16) for edge in mapped.split()[0].split("-"))
    assert low <= addresses[0][0] and addresses[-1][0] < high


@pytest.mark.parametrize("num_shards, vocab_dim", [(1, 1), (2, 1), (2, 0)])
def test_meta_directories_are_the_hf_ones(tmp_path, num_shards, vocab_dim):
    hf = hf_directory(tmp_path / "hf", "llama", num_key_value_heads=4)
    meta_directory(tmp_path / "meta", hf, num_shards, vocab_dim)
    ours, expected = load_base(tmp_path / "meta"), load_base(tmp_path / "hf")
    assert ours.config.vocab_size == 160 and ours.config.num_heads_kv == 4
    for name, parameter in expected.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    tokens = torch.stack(prompts([20]))
    torch.testing.assert_close(ours(tokens), logits_of(hf, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_torch_save_are_read(tmp_path, legacy):
    """pytorch_model.bin, and files as torch wrote them before 1.6."""
    hf = hf_directory(tmp_path)
    expected = load_base(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "mapped")
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    for name, parameter in load_base(tmp_path).named_parameters():
        assert torch.equal(expected.get_parameter(name), parameter), name


def test_meta_llama3_is_recognised():
    params = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "multiple_of": 1024,
        "norm_eps": 1e-5,
    }
    params |= {
        "ffn_dim_multiplier": 1.3,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }
    config = LlamaConfig.from_meta(params, 128256)
    assert (config.intermediate_size, config.head_dim, config.num_heads_kv) == (14336, 128, 8)
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("llama3", 8.0)
    assert config.max_seq_len == 131072 and config.bos_id == 128000
    seven_billion = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "vocab_size": -1}
    config = LlamaConfig.from_meta(seven_billion, 32000)
    assert (config.intermediate_size, config.num_heads_kv, config.rope_scaling) == (11008, 32, None)
    assert AdapterConfig().layers(32) == tuple(range(2, 32))


def test_a_full_disk_leaves_a_saved_base_as_it_was(tmp_path, monkeypatch):
    save_base(make_base(), tmp_path)
    before = contents(tmp_path)
    fill_at(monkeypatch, 2)
    with pytest.raises(OSError, match="No space"):
        save_base(make_base(seed=1), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_save_base_is_read_by_transformers(tmp_path, kind):
    import transformers

    hf = hf_directory(tmp_path / "hf", kind)
    save_base(load_base(tmp_path / "hf"), tmp_path / "ours")
    assert load_base(tmp_path / "ours").config == load_base(tmp_path / "hf").config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.stack(prompts([30]))
    assert torch.equal(logits_of(again, tokens), logits_of(hf, tokens))


def test_generation_config_names_the_ends(tmp_path):
    hf_directory(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_base(tmp_path).config.eos_ids == (2, 7)


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path, edit):
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def write_index(path, text):
    """In the place of the single file."""
    (path / "model.safetensors").rename(path / "weights.safetensors")
    (path / "model.safetensors.index.json").write_text(text)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


BAD_HF = {
    "no directory": (shutil.rmtree, "is not a directory"),
    "no config": (lambda d: (d / "config.json").unlink(), "neither config.json .* nor params.json"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "architecture": (
        lambda d: edit_config(d, model_type="qwen2"),
        "model_type 'qwen2', supported are llama and mistral",
    ),
    "bias": (lambda d: edit_config(d, attention_bias=True), "attention_bias = True"),
    "rope": (
        lambda d: edit_config(d, rope_parameters={"rope_type": "yarn", "factor": 2.0}),
        "scaling of type 'yarn', supported are default, linear, llama3",
    ),
    "quantised": (lambda d: edit_config(d, quantization_config={}), "quantised"),
    "no field": (
        lambda d: edit_config(d, hidden_size=None),
        "must have a positive whole number as hidden_size",
    ),
    "text": (
        lambda d: edit_config(d, rms_norm_eps="x"),
        "must have a positive number as rms_norm_eps, it has 'x'",
    ),
    "rope text": (lambda d: edit_config(d, rope_parameters="x"), "rotary embedding by an object, it has 'x'"),
    "window": (
        lambda d: edit_config(d, model_type="mistral", sliding_window=-1),
        "positive whole number as sliding_window, it has -1",
    ),
    "endless vocabulary": (
        lambda d: edit_config(d, vocab_size=2**70),
        r"must have a number below 2\*\*31 as vocab_size, it has 1180",
    ),
    "ten million layers": (
        lambda d: edit_config(d, num_hidden_layers=10**7),
        "holds 4 layers, the configuration says 10000000",
    ),
    "tied by a word": (
        lambda d: edit_config(d, tie_word_embeddings="no"),
        "must have true or false as tie_word_embeddings, it has 'no'",
    ),
    "tied, with another output": (
        lambda d: edit_config(d, tie_word_embeddings=True),
        "says tie_word_embeddings = true, and its lm_head.weight is not its embedding",
    ),
    "an unknown field": (
        lambda d: edit_config(d, qk_norm=True),
        "says qk_norm = True, which is not supported",
    ),
    "one weight twice": (
        lambda d: edit_weights(d, lambda w: w.update({"norm.weight": torch.ones(64)})),
        r"holds norm\.weight twice",
    ),
    "float8": (
        lambda d: edit_weights(
            d, lambda w: w.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)})
        ),
        "is torch.float8_e4m3fn, quantised weights are not supported",
    ),
    "an index to elsewhere": (
        lambda d: write_index(d, json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}})),
        "which is not inside its folder",
    ),
    "a deep configuration": (lambda d: (d / "config.json").write_text("[" * 100_000), "is nested too deeply"),
    "a pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors is a Git LFS pointer in place of the file: run git lfs pull",
    ),
    "empty index": (
        lambda d: write_index(d, "{}"),
        "must name the file of each tensor",
    ),
    "index of numbers": (
        lambda d: write_index(d, '{"weight_map": {"a": 1}}'),
        "must name the file of each tensor",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "model.safetensors is truncated"),
    "key missing": (
        lambda d: edit_weights(d, lambda w: w.pop("model.layers.2.mlp.up_proj.weight")),
        r"lacks layers\.2\.mlp\.up_proj\.weight\.$",
    ),
    "key unknown": (
        lambda d: edit_weights(
            d, lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)})
        ),
        r"holds layers\.1\.self_attn\.q_proj\.bias, which",
    ),
    "shape": (
        lambda d: edit_config(d, vocab_size=170),
        r"(embed_tokens|lm_head).weight must have shape \(170, 64\) .* the file has \(160, 64\)",
    ),
}


@pytest.mark.parametrize("case", BAD_HF)
def test_bad_hf_directories(tmp_path, case):
    damage, message = BAD_HF[case]
    hf_directory(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_base(tmp_path)


def test_of_a_single_file_and_an_index_transformers_reads_the_file(tmp_path):
    """Both are there where a model was saved twice in one folder."""
    expected = hf_directory(tmp_path).state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / "a.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_base(tmp_path).embed_tokens.weight, expected["model.embed_tokens.weight"])


def test_missing_shard_is_named(tmp_path):
    hf_directory(tmp_path, shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name} of the"):
        load_base(tmp_path)


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def edit_meta(path, **changes):
    params = json.loads((path / "params.json").read_text()) | changes
    (path / "params.json").write_text(json.dumps(params))


def edit_shard(path, name, edit):
    shard = torch.load(path / "consolidated.01.pth")
    torch.save(shard | {name: edit(shard[name])}, path / "consolidated.01.pth")


def damage_pickle(path):
    """A file of torch.save whose pickle asks for what it never stored."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02h\x05.")
        file.writestr("a/version", "3\n")


BAD_META = {
    "no dim": (lambda d: edit_meta(d, dim=None), "positive whole number as dim, it has None"),
    "no heads": (lambda d: edit_meta(d, n_heads=0), "positive whole number as n_heads, it has 0"),
    "no multiple": (lambda d: edit_meta(d, multiple_of=0), "positive whole number as multiple_of, it has 0"),
    "multiplier": (
        lambda d: edit_meta(d, ffn_dim_multiplier="x"),
        "number as ffn_dim_multiplier, it has 'x'",
    ),
    "shard shape": (
        lambda d: edit_shard(d, "layers.1.attention.wk.weight", lambda weight: weight[0]),
        r"layers\.1\.attention\.wk\.weight must be a matrix of one shape in all shards",
    ),
    "one of two shards": (lambda d: (d / "consolidated.01.pth").unlink(), "holds 1 of 2 shards"),
    "first shard missing": (lambda d: (d / "consolidated.00.pth").unlink(), "found consolidated.01.pth"),
    "dtypes": (
        lambda d: edit_shard(d, "layers.1.attention.wk.weight", lambda weight: weight.half()),
        r"layers\.1\.attention\.wk\.weight must have one dtype in all shards",
    ),
    "sparse": (
        lambda d: edit_shard(d, "layers.1.attention.wk.weight", lambda weight: weight.to_sparse()),
        "consolidated.01.pth holds a sparse tensor; only dense tensors",
    ),
    "a pipe": (
        lambda d: ((d / "consolidated.01.pth").unlink(), os.mkfifo(d / "consolidated.01.pth")),
        "consolidated.01.pth is neither a file nor a folder",
    ),
    "unknown field": (lambda d: edit_meta(d, use_qk_norm=True), "params.json says use_qk_norm = True"),
    "truncated": (lambda d: truncate(d / "consolidated.01.pth"), "consolidated.01.pth is truncated"),
    "damaged": (
        lambda d: damage_pickle(d / "consolidated.01.pth"),
        "consolidated.01.pth is truncated, or neither safetensors nor",
    ),
    "malicious": (
        lambda d: torch.save({"norm.weight": Malicious()}, d / "consolidated.01.pth"),
        "holds Python objects beside tensors, so it was not loaded",
    ),
    "other tensors": (
        lambda d: torch.save({"norm.weight": torch.ones(64)}, d / "consolidated.01.pth"),
        "shard 1 holds other tensors",
    ),
}


@pytest.mark.parametrize("case", BAD_META)
def test_bad_meta_directories(tmp_path, case, capsys):
    damage, message = BAD_META[case]
    meta_directory(tmp_path, hf_model("llama"), num_shards=2)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_base(tmp_path)
    assert "executed" not in capsys.readouterr().out
