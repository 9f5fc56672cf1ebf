"""Quantised Hugging Face folders: the numbers that each format's description gives, kept packed where they can be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import hf_directory
from tiny_quantised import awq, compressed, float8, gptq, nf4, whole_bytes, write_folder

from model.errors import UserError
from model.fingerprint import adapter_metadata
from model.loading import load_base
from zinit_kernels.packed import PackedLinear, Scheme

TOKENS = torch.arange(3, 43)[None]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_8bit": True}
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}


WHOLE = 0  # a scale for a row: the largest group that divides the columns


def of_gptq(bits=4, **settings):
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": "gptq"} | settings


# settings, writer, and how the matrices stay packed (None: they become numbers)
FOLDERS = {
    "gptq": (of_gptq(), gptq(4, 32), Scheme(4, 32)),
    "gptq, zeros": (of_gptq(), gptq(4, 32, symmetric=False), Scheme(4, 32, True)),
    "gptq, version 2": (of_gptq(checkpoint_format="gptq_v2"), gptq(4, 32, False, version=2), Scheme(4, 32, True)),
    "gptq, 8 bits": (of_gptq(8), gptq(8, 32), Scheme(8, 32)),
    "gptq, 8 bits, zeros": (of_gptq(8), gptq(8, 32, symmetric=False), None),
    "gptq, a scale a row": (of_gptq(group_size=-1), gptq(4, -1), Scheme(4, WHOLE)),
    "gptq, groups of 16": (of_gptq(group_size=16), gptq(4, 16), None),
    "gptq, columns out of order": (of_gptq(desc_act=True), gptq(4, 32, False, act_order=True), None),
    "awq": (AWQ, awq(32), Scheme(4, 32, True)),
    "compressed, 4 bits": (COMPRESSED, compressed(4, 32), Scheme(4, 32)),
    "compressed, zeros": (COMPRESSED, compressed(4, 32, symmetric=False), Scheme(4, 32, True)),
    "compressed, 8 bits": (COMPRESSED, compressed(8, -1), Scheme(8, WHOLE)),
    "compressed, columns out of order": (COMPRESSED, compressed(4, 32, act_order=True), None),
    "compressed, bytes": (COMPRESSED, whole_bytes("weight_scale"), Scheme(8, WHOLE)),
    "compressed, floats": (COMPRESSED, float8("weight_scale", (1, 0)), None),
    "compressed, one scale": (COMPRESSED, float8("weight_scale", (0, 0)), None),
    "bitsandbytes, 8 bits": (BITSANDBYTES, whole_bytes("SCB"), Scheme(8, WHOLE)),
    "bitsandbytes, nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4(double=False), None),
    "bitsandbytes, nf4 twice": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4(double=True), None),
    "torchao, 8 bits": (
        TORCHAO, whole_bytes("_weight_scale", "_weight_zero_point", "_weight_qdata"), Scheme(8, WHOLE)
    ),
    "torchao, 4 bits": (
        TORCHAO, whole_bytes("_weight_scale", "_weight_zero_point", "_weight_qdata", 4, 32), Scheme(4, 32)
    ),
    "fp8, blocks": (
        {"quant_method": "fp8", "weight_block_size": [64, 32]}, float8("weight_scale_inv", (64, 32)), None
    ),
    "fp8, rows": ({"quant_method": "fbgemm_fp8"}, float8("weight_scale", (1, 0)), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_numbers_are_the_formats_and_stay_packed(tmp_path, kind):
    settings, writer, scheme = FOLDERS[kind]
    hf_directory(tmp_path, num_hidden_layers=2)
    expected = write_folder(tmp_path, settings, writer)
    base = load_base(tmp_path, torch.float32)
    for name, numbers in expected.items():
        # a min, scale * zero, is rounded to float16; all else is exact
        atol = 2**-11 * 16 * 0.02 if scheme is not None and scheme.has_min else 1e-7
        torch.testing.assert_close(base.state_dict()[name], numbers, rtol=0, atol=atol)
    kept = load_base(tmp_path, torch.float32, quantise="int4")
    for name in expected:
        layer = kept.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, PackedLinear)
        if scheme is not None:
            group = scheme.group or (64 if expected[name].shape[1] % 64 == 0 else 32)
            assert layer.packed.scheme == scheme._replace(group=group)
            assert torch.equal(layer.packed.unpack(torch.float32), base.state_dict()[name])
    if scheme is not None:
        with torch.no_grad():
            logits, ours = (b.logits(b.hidden_states(TOKENS)) for b in (base, kept))
        # the embedding and the output have 8 bits in `kept`
        torch.testing.assert_close(ours, logits, rtol=0, atol=0.05 * float(logits.abs().max()))


def test_an_adapter_fits_the_folder_packed_and_as_numbers(tmp_path):
    hf_directory(tmp_path, num_hidden_layers=2)
    write_folder(tmp_path, AWQ, awq(32))
    plain = load_base(tmp_path, torch.bfloat16)
    expected = {name: t for name, t in plain.state_dict().items() if "proj" in name}
    kept = load_base(tmp_path, torch.bfloat16, quantise="int8")
    unpacked = {
        name: kept.get_submodule(name.removesuffix(".weight")).packed.unpack(torch.bfloat16)
        for name in expected
    }
    assert all(torch.equal(unpacked[name], expected[name]) for name in expected)
    assert adapter_metadata(kept) == adapter_metadata(plain)


@pytest.mark.parametrize("kind", ["torchao, 8 bits", "compressed, bytes"])
@pytest.mark.parametrize("format", [None, "int8"])
def test_the_embedding_may_be_quantised_too(tmp_path, kind, format):
    settings, writer, _ = FOLDERS[kind]
    hf_directory(tmp_path, num_hidden_layers=1)
    expected = write_folder(
        tmp_path, settings, writer, ("_proj.weight", "embed_tokens.weight", "lm_head.weight")
    )
    base = load_base(tmp_path, quantise=format)
    assert base.dtype == torch.bfloat16
    numbers = base.embed_tokens.weight if format is None else base.embed_tokens.packed.unpack(torch.bfloat16)
    torch.testing.assert_close(numbers, expected["embed_tokens.weight"].bfloat16(), rtol=0, atol=0)
    with torch.no_grad():
        assert base.logits(base.hidden_states(TOKENS)).isfinite().all()


def test_scales_that_float16_cannot_hold_make_numbers(tmp_path):
    hf_directory(tmp_path, num_hidden_layers=1)
    expected = write_folder(tmp_path, BITSANDBYTES, whole_bytes("SCB"))
    weights = load_file(tmp_path / "model.safetensors")
    for name in weights:
        if name.endswith("SCB"):
            weights[name] *= 1e-6
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    state = load_base(tmp_path, torch.float32).state_dict()
    for name, numbers in expected.items():
        torch.testing.assert_close(state[name], numbers * 1e-6, rtol=1e-6, atol=0)


def set_part(part, change):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith(part))
        changed = change(weights.pop(name))
        if changed is not None:
            weights[name] = changed.contiguous()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return edit


def settings_of(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def state(**changes):
    def change(content):
        described = json.loads(bytes(content.tolist())) | changes
        return torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)

    return change


NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
BAD = {
    "another method": ("gptq", settings_of(quant_method="hqq"), "quant_method 'hqq', supported are gptq, awq"),
    "no method": ("gptq", settings_of(quant_method=None), "quant_method None, supported"),
    "3 bits": ("gptq", settings_of(bits=3), "says 3 bits in quantization_config, supported are 4 and 8"),
    "bits by a word": ("gptq", settings_of(bits="4"), "says '4' bits"),
    "marlin": ("gptq", settings_of(checkpoint_format="marlin"), "checkpoint_format = 'marlin'"),
    "rules by layer": ("gptq", settings_of(dynamic={"+:.*": {"bits": 8}}), "says dynamic = "),
    "gemv": ("awq", settings_of(version="gemv"), "says version = 'gemv' in quantization_config, supported is 'gemm'"),
    "a quantised cache": (
        "compressed, bytes", settings_of(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme = .* supported is none",
    ),
    "rotations": ("compressed, bytes", settings_of(transform_config={"R1": {}}), "transform_config"),
    "no scales": ("gptq", set_part("q_proj.scales", lambda t: None), "q_proj lacks scales, it has"),
    "cut words": ("gptq", set_part("qweight", lambda t: t[:-1]), "scales in a row of|must name a group|g_idx must be"),
    "other zeros": ("gptq", set_part("qzeros", lambda t: t[:, :-1]), r"qzeros must be int32 of shape"),
    "floats as words": ("awq", set_part("qweight", lambda t: t.float()), "qweight must be int32"),
    "a real bias": ("gptq", set_part("q_proj.bias", lambda t: t + 1), "q_proj has a bias"),
    "groups that are not there": (
        "gptq, columns out of order", set_part("g_idx", lambda t: t + 1), "must name a group below",
    ),
    "GPU order": ("bitsandbytes, 8 bits", set_part("weight_format", lambda t: t + 2), "weight_format"),
    "a huge shape": (
        "bitsandbytes, nf4", set_part(NF4_STATE, state(shape=[2**30, 2**30])), "weight must be uint8 of shape",
    ),
    "a shape of words": (
        "bitsandbytes, nf4", set_part(NF4_STATE, state(shape=["a", 1])), "a positive whole number as rows",
    ),
    "no block size": ("bitsandbytes, nf4", set_part(NF4_STATE, state(blocksize=0)), "number as blocksize, it has 0"),
    "no JSON": ("bitsandbytes, nf4", set_part(NF4_STATE, lambda t: t[:-1]), "no description of a matrix"),
    "an offset by a word": (
        "bitsandbytes, nf4 twice", set_part(NF4_STATE, state(nested_offset="x")), "offset that is no number",
    ),
    "uneven blocks": ("fp8, blocks", settings_of(weight_block_size=[7, 7]), "has scales of shape"),
    "blocks of nothing": ("fp8, blocks", settings_of(weight_block_size=[0, "a"]), "for blocks of"),
    "an empty table": ("torchao, 8 bits", set_part("_weight_scale", lambda t: t[:0]), "_weight_scale must be"),
    "another width": (
        "compressed, 4 bits", set_part("weight_shape", lambda t: t * 3), "weight_packed must be|words in a row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_supported_is_said_in_one_sentence(tmp_path, kind):
    folder, edit, message = BAD[kind]
    settings, writer, _ = FOLDERS[folder]
    hf_directory(tmp_path, num_hidden_layers=1)
    write_folder(tmp_path, settings, writer)
    edit(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_base(tmp_path)
    assert "\n" not in str(error.value)
