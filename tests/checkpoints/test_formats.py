"""Every adapter format there and back, what each refuses; a damaged file gets one sentence and touches nothing."""

import json
import os
import random
from dataclasses import replace

import pytest
import torch
from adapter_files import (
    ADAPTED,
    FOREIGN,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    TOLD,
    format_of,
    litgpt,
    normal,
    official_v1,
    ours,
    peft,
    put,
    write_peft,
)
from safetensors.torch import load_file, save_file

from zinit_kernels import convert, inspect
from zinit_kernels.checkpoints import CheckpointError, load_adapter, save_adapter


def stored(path):
    """Every tensor and configuration of a written file."""
    if path.is_dir():
        config = json.loads((path / "adapter_config.json").read_text())
        config.pop("inference_mode", None)
        return load_file(path / "adapter_model.safetensors"), config
    content = torch.load(path, weights_only=True)
    return content.get("model", content), content.get("config")


@pytest.mark.parametrize("name", FOREIGN)
def test_round_trip_through_ours_is_exact(tmp_path, name):
    """Foreign -> ours -> foreign: the same tensors, dtypes and configuration."""
    source = put(tmp_path / "source", name)
    save_adapter(tmp_path / "ours.safetensors", load_adapter(source, **TOLD))
    loaded = load_adapter(tmp_path / "ours.safetensors")
    save_adapter(tmp_path / "back", loaded, format_of(name))
    tensors, config = stored(source)
    back, back_config = stored(tmp_path / "back")
    assert back.keys() == tensors.keys() and back_config == config
    for key in tensors:
        assert back[key].dtype == tensors[key].dtype and torch.equal(back[key], tensors[key]), key


def test_adapter_v2_of_lit_llama(tmp_path):
    """Other names of norms than litgpt's."""
    state = litgpt(gate_shape=(1,))["model"] | {"transformer.h.0.attn.c_attn.adapter_bias": normal(96)}
    state |= {f"transformer.{name}.scale": normal(HIDDEN) for name in ("h.0.rms_1", "h.0.rms_2", "ln_f")}
    torch.save(state, tmp_path / "a")
    assert len(load_adapter(tmp_path / "a", **TOLD).extras) == 4


def test_a_whole_training_file_and_an_old_gate_shape(tmp_path):
    torch.save({"model": official_v1(), "optimizer": {}, "epoch": 3, "scaler": None}, tmp_path / "whole.pth")
    torch.save(official_v1(), tmp_path / "extracted.pth")
    whole, extracted = (load_adapter(tmp_path / f"{name}.pth") for name in ("whole", "extracted"))
    assert torch.equal(whole.prompts, extracted.prompts) and torch.equal(whole.gates, extracted.gates)
    torch.save(litgpt(gate_shape=(1, HEADS, 1, 1)), tmp_path / "old.pth")
    torch.save(litgpt(), tmp_path / "new.pth")
    old, new = (load_adapter(tmp_path / f"{name}.pth", layout="blocked") for name in ("old", "new"))
    assert torch.equal(old.gates, new.gates) and old.gates.shape == (4, HEADS)


def effective(checkpoint):
    gates = checkpoint.gates.double()
    return gates.tanh() if checkpoint.gate_activation == "tanh" else gates


@pytest.mark.parametrize("target", ["zinit", "official-v1", "official-v2", "peft", "litgpt"])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_conversions_mean_the_same(tmp_path, target, heads, activation):
    gates = normal(len(ADAPTED), 1, scale=0.3).expand(-1, heads).contiguous()
    source = replace(ours(), gates=gates, gate_activation=activation)
    save_adapter(tmp_path / "file", source, target)
    loaded = load_adapter(tmp_path / "file", **TOLD)
    assert torch.equal(loaded.prompts, source.prompts) and loaded.layers == ADAPTED
    assert loaded.num_layers == LAYERS and loaded.num_heads == HEADS
    torch.testing.assert_close(*torch.broadcast_tensors(effective(loaded), effective(source)))


def test_new_gate_is_a_factor_of_the_gate(tmp_path):
    source = put(tmp_path / "source", "official-v2-lora")
    state, loaded = FOREIGN["official-v2-lora"]()["model"], load_adapter(source)
    assert loaded.gate_activation == "identity"
    for row, layer in enumerate(ADAPTED):
        gate = state[f"llama.layers.{layer}.attention.gate"].flatten()
        factor = state[f"llama.layers.{layer}.attention.new_gate"].flatten()
        assert torch.equal(loaded.gates[row], gate.tanh() * factor)
    changed = replace(loaded, gates=loaded.gates * 2)
    with pytest.raises(CheckpointError, match="no longer the product of the file's gate and new_gate"):
        save_adapter(tmp_path / "back", changed, "official-v2")


LOSSES = {
    "heads into one": (ours, "peft", "peft has no room for 4 gates in each layer .*which would be lost"),
    "v2 into v1": (
        "official-v2",
        "official-v1",
        "no room for 16 tensors of official-v2 .*llama.layers.0.attention.wq",
    ),
    "v2 into litgpt": ("official-v2", "litgpt", "litgpt has no room for 16 tensors of official-v2"),
    "litgpt v2 into v2": ("litgpt-v2", "official-v2", "official-v2 has no room for 4 tensors of litgpt"),
    "interleaved": (
        lambda: replace(ours(), layout="interleaved"),
        "official-v1",
        "litgpt's interleaved rows of qkv",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_is_refused_and_named(tmp_path, case):
    source, target, message = LOSSES[case]
    checkpoint = source() if callable(source) else load_adapter(put(tmp_path / "source", source), **TOLD)
    if target == "official-v2":
        checkpoint = replace(checkpoint, gates=checkpoint.gates.clamp(-0.9, 0.9))
    with pytest.raises(CheckpointError, match=message):
        save_adapter(tmp_path / "there", checkpoint, target)
    assert not (tmp_path / "there").exists()
    save_adapter(tmp_path / "there", checkpoint, target, allow_loss=True)
    loaded = load_adapter(tmp_path / "there", **TOLD)
    assert torch.equal(loaded.prompts, checkpoint.prompts) and not loaded.extras
    if target == "peft":
        torch.testing.assert_close(loaded.gates, checkpoint.gates.tanh().mean(1, keepdim=True))


def test_what_is_beside_prompts_and_gates_is_told_to_a_base(tmp_path):
    loaded = load_adapter(put(tmp_path / "source", "official-v2"))
    message = "not the whole adapter: it also has 16 tensors of official-v2"
    with pytest.raises(CheckpointError, match=message):
        loaded.check_base(HIDDEN, LAYERS, HEADS)


def test_facts_that_a_format_does_not_hold_are_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match="pass --layout interleaved .* by litgpt 0.5.5 or newer"):
        load_adapter(put(tmp_path / "litgpt", "litgpt"))
    one_gate = load_adapter(put(tmp_path / "peft", "peft"))
    with pytest.raises(CheckpointError, match=r"how many heads its base has: pass --num-heads"):
        save_adapter(tmp_path / "there", one_gate, "litgpt")
    with pytest.raises(CheckpointError, match="layout must be one of blocked, interleaved, got 'other'"):
        load_adapter(tmp_path / "litgpt", layout="other")
    gpt2 = {
        f"base_model.model.transformer.h.{n}.attn.adaption_{w}": torch.ones(1)
        for n in (0, 1)
        for w in ("gate",)
    }
    save_file(gpt2, tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="is for GPT-2, whose adaption prompts"):
        load_adapter(tmp_path / "gpt2")
    write_peft(tmp_path / "other", peft(), adapter_len=7)
    with pytest.raises(CheckpointError, match="says adapter_len = 7, the weights say 10"):
        load_adapter(tmp_path / "other")


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def without_one(state):
    """Not the last: an official file of fewer layers is one of a smaller base."""
    return {key: tensor for key, tensor in state.items() if key != list(state)[1]}


DAMAGES = {  # damage -> (what it does to the tensors, the message)
    "missing": (without_one, "lacks"),
    "extra": (lambda s: s | {"model.wv": torch.ones(2)}, r"holds unknown model\.wv"),
    "shape": (
        lambda s: {k: t[..., None] if "gate" in k or "gating" in k else t for k, t in s.items()},
        "shape",
    ),
    "prompt shape": (lambda s: {k: t if "gat" in k else t[None] for k, t in s.items()}, "shape|whole number"),
    "dtype": (lambda s: {k: t.to(torch.int64) for k, t in s.items()}, "floating-point"),
    "not finite": (lambda s: {k: torch.full_like(t, torch.nan) for k, t in s.items()}, "finite"),
    "truncated": (None, "truncated"),
    "not a checkpoint": (None, "truncated, or neither|folder without|truncated or damaged"),
    "pickle": (None, "holds Python objects beside tensors, so it was not loaded|neither safetensors nor"),
}
HOLDERS = ("zinit", "official-v1", "official-v2", "peft", "litgpt")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", HOLDERS)
def test_malformed_checkpoints(tmp_path, monkeypatch, capsys, name, damage):
    """45 of them: one clear error each, through the library and the shell, and the destination as it was."""
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    if name == "zinit":
        save_adapter(source, ours())
        weights = source
    else:
        put(source, name)
        weights = source / "adapter_model.safetensors" if name == "peft" else source
    change, message = DAMAGES[damage]
    if change is not None and name in ("zinit", "peft"):
        metadata = {"format": "pt"}
        if name == "zinit":
            from safetensors import safe_open

            with safe_open(weights, "pt") as file:
                metadata = file.metadata()
        save_file({key: t.contiguous() for key, t in change(load_file(weights)).items()}, weights, metadata)
    elif change is not None:
        content = torch.load(weights, weights_only=True)
        whole = "model" in content
        state = content["model"] if whole else content
        beside = {
            key: t for key, t in state.items() if not ("query" in key or "gat" in key or "adapter" in key)
        }
        beside |= {key: t for key, t in state.items() if key.startswith("visual")}
        state = beside | change({key: t for key, t in state.items() if key not in beside})
        torch.save(content | {"model": state} if whole else state, weights)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-200])
    elif damage == "not a checkpoint":
        weights.write_bytes(b"This is a text, and a long one at that." * 40)
    elif name in ("zinit", "peft"):  # a pickle under a safetensors name
        torch.save({"x": Malicious()}, weights)
    else:
        torch.save({"model": {"x": Malicious()} | official_v1()}, weights)
    before = weights.read_bytes()

    with pytest.raises(CheckpointError, match=message) as raised:
        load_adapter(source, layout="blocked")
    assert str(weights) in str(raised.value) and "\n" not in str(raised.value)
    destination = tmp_path / "destination"
    destination.write_bytes(b"before")
    assert convert.main([str(source), str(destination), "--layout", "blocked"]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {raised.value}.\n" and printed.out == ""
    assert destination.read_bytes() == b"before" and weights.read_bytes() == before
    assert not (tmp_path / "executed").exists()
    assert sorted(os.listdir(tmp_path)) == ["destination", "source"]


@pytest.mark.parametrize("name", ["zinit", "official-v1", "official-v2-lora", "peft", "litgpt-v2"])
def test_damaged_bytes(tmp_path, name):
    """Wherever a file is hit: it is read, or one sentence says that it is damaged."""
    if name == "zinit":
        save_adapter(tmp_path / "source", ours())
    else:
        put(tmp_path / "source", name)
    weights = tmp_path / "source" / "adapter_model.safetensors" if name == "peft" else tmp_path / "source"
    content, chance, refused = weights.read_bytes(), random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 5)):
            place = chance.randrange(chance.choice([16, 500, 2000, len(content)]))
            damaged[place : place + chance.randint(0, 3)] = chance.randbytes(chance.randint(1, 2))
        weights.write_bytes(damaged)
        try:
            load_adapter(tmp_path / "source", layout="blocked")
        except CheckpointError as error:
            refused += 1
            assert str(weights) in str(error)
    assert refused > 50


def test_the_shell_converts_and_inspects(tmp_path, capsys):
    source = put(tmp_path / "v1.pth", "official-v1")
    assert convert.main([str(source), str(tmp_path / "there"), "--to", "peft"]) == 2
    assert "peft has no room for 4 gates in each layer" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()
    assert convert.main([str(source), str(tmp_path / "there"), "--to", "peft", "--allow-loss"]) == 0
    assert "(official-v1) -> " in capsys.readouterr().out

    for options, expected in (([], torch.tanh), (["--activation", "identity"], lambda gate: gate)):
        assert convert.main([str(source), str(tmp_path / "lit"), "--to", "litgpt", *options]) == 0
        assert "litgpt from 0.5.5 on projects prompts by other rows" in capsys.readouterr().out
        state, _ = stored(tmp_path / "lit")
        gate = official_v1()["layers.3.attention.gate"].flatten()
        torch.testing.assert_close(state["transformer.h.3.attn.gating_factor"].flatten(), expected(gate))

    assert inspect.main([str(put(tmp_path / "v2.pth", "official-v2"))]) == 0
    printed = capsys.readouterr().out
    assert "format      official-v2" in printed and "16 tensors of official-v2, kept:" in printed
    gate = official_v1()["layers.2.attention.gate"].tanh().mean()
    assert f"    2      {float(gate):+.4f}" in printed
    for command in (inspect.main, lambda words: convert.main([*words, str(tmp_path / "there")])):
        assert command([str(tmp_path / "absent")]) == 2
        assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: No such file or directory.\n"


def test_peft_itself_reads_and_writes_these_files(tmp_path):
    pytest.importorskip("peft")
    from peft import AdaptionPromptConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=64,
    )
    base = LlamaForCausalLM(config)
    model = get_peft_model(
        base, AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=4, task_type="CAUSAL_LM")
    )
    for key, parameter in model.named_parameters():
        if key.endswith("adaption_gate"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(tmp_path / "theirs")
    assert loaded.layers == ADAPTED and loaded.prompts.shape == (4, LENGTH, HIDDEN)
    save_adapter(tmp_path / "ours.safetensors", loaded)
    save_adapter(tmp_path / "back", load_adapter(tmp_path / "ours.safetensors"), "peft")
    back = PeftModel.from_pretrained(LlamaForCausalLM(config), tmp_path / "back").state_dict()
    adapter = {key: tensor for key, tensor in model.state_dict().items() if "adaption" in key}
    assert len(adapter) == 8 and all(torch.equal(back[key], adapter[key]) for key in adapter)
