"""Adapter files: round trips are exact, foreign files are strict, nothing is executed, nothing is half
written.
"""

import argparse
import errno
import os

import pytest
import torch
from adapter_files import HEADS, HIDDEN, LAYERS, LENGTH, checkpoint, official

from zinit_kernels.checkpoints import (
    CheckpointError,
    load_adapter,
    save_adapter,
    write_atomically,
)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_zinit_round_trip(tmp_path, activation, heads):
    saved = checkpoint(activation, heads, layers=(1, 4), metadata={"base": "tiny", "steps": "12"})
    save_adapter(tmp_path / "adapter.safetensors", saved)
    loaded = load_adapter(tmp_path / "adapter.safetensors")
    assert torch.equal(loaded.prompts, saved.prompts) and torch.equal(loaded.gates, saved.gates)
    for name in ("gate_activation", "layers", "num_layers", "num_heads", "metadata"):
        assert getattr(loaded, name) == getattr(saved, name)


def test_equal_adapters_are_equal_files(tmp_path):
    for name in ("a", "b", "c"):
        save_adapter(tmp_path / name, checkpoint(metadata={"base": "tiny", "steps": "12"}))
    assert len({(tmp_path / name).read_bytes() for name in ("a", "b", "c")}) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_official_v1(tmp_path, whole):
    state = official()
    content = state
    if whole:
        base = {
            "tok_embeddings.weight": torch.ones(9, HIDDEN),
            "layers.0.attention.wq.weight": torch.ones(2, 2),
        }
        arguments = argparse.Namespace(adapter_len=LENGTH, adapter_layer=4)
        content = {
            "model": state | base,
            "optimizer": {"state": {}},
            "epoch": 4,
            "scaler": {},
            "args": arguments,
        }
    torch.save(content, tmp_path / "adapter.pth")
    loaded = load_adapter(tmp_path / "adapter.pth")
    assert (loaded.layers, loaded.num_layers, loaded.num_heads) == ((2, 3, 4, 5), LAYERS, HEADS)
    assert loaded.gate_activation == "tanh"
    for row, layer in enumerate(loaded.layers):
        expected = state["adapter_query.weight"][row * LENGTH : (row + 1) * LENGTH]
        assert torch.equal(loaded.prompts[row], expected)
        assert torch.equal(loaded.gates[row], state[f"layers.{layer}.attention.gate"].flatten())
    assert load_adapter(tmp_path / "adapter.pth", gate_activation="identity").gate_activation == "identity"


def test_prompt_length_is_told_by_the_caller_or_by_the_training_file(tmp_path):
    state = official()
    torch.save(state, tmp_path / "extracted.pth")
    assert load_adapter(tmp_path / "extracted.pth", prompt_length=8).prompts.shape == (5, 8, HIDDEN)
    whole = {"model": official(adapted=2, length=20), "args": argparse.Namespace(adapter_len=20)}
    torch.save(whole, tmp_path / "whole.pth")
    assert load_adapter(tmp_path / "whole.pth").prompts.shape == (2, 20, HIDDEN)
    torch.save({"model": state, "args": 5}, tmp_path / "odd.pth")
    assert load_adapter(tmp_path / "odd.pth").prompts.shape == (4, 10, HIDDEN)
    with pytest.raises(
        CheckpointError, match="not a whole number of at most 6 layers of 7 prompts.*pass prompt_length"
    ):
        load_adapter(tmp_path / "extracted.pth", prompt_length=7)
    with pytest.raises(CheckpointError, match="topmost 2 of 6 layers, and layer 2 has a gate that is not 0"):
        load_adapter(
            tmp_path / "extracted.pth", prompt_length=20
        )  # the gates of layers 2 and 3 would be dropped


@pytest.mark.parametrize(("adapted", "length"), [(2, 5), (4, 5), (1, 20), (2, 20)])
def test_another_prompt_length_than_10_is_told_from_the_gates(tmp_path, adapted, length):
    torch.save(official(adapted=adapted, length=length), tmp_path / "adapter.pth")
    message = f"but {adapted} have a gate that is not 0; the format does not store P: pass prompt_length"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path / "adapter.pth")
    assert load_adapter(tmp_path / "adapter.pth", prompt_length=length).prompts.shape == (
        adapted,
        length,
        HIDDEN,
    )


def test_first_release_had_one_raw_gate_per_layer(tmp_path):
    torch.save(official(gate_shape=(1,)), tmp_path / "adapter.pth")
    loaded = load_adapter(tmp_path / "adapter.pth")
    assert (loaded.gates.shape, loaded.gate_activation, loaded.num_heads) == ((4, 1), "identity", None)


def test_a_base_with_one_head_is_not_the_first_release(tmp_path):
    """Both have one number per layer: only its shape tells that tanh belongs to it."""
    torch.save(official(gate_shape=(1, 1, 1, 1)), tmp_path / "adapter.pth")
    loaded = load_adapter(tmp_path / "adapter.pth")
    assert (loaded.gate_activation, loaded.num_heads) == ("tanh", 1)
    save_adapter(tmp_path / "again.pth", loaded, "official-v1")
    again = load_adapter(tmp_path / "again.pth")
    assert (again.gate_activation, again.num_heads) == ("tanh", 1) and torch.equal(again.gates, loaded.gates)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_written_official_v1_means_the_same(tmp_path, activation, heads):
    """Compared after the activation: the format applies tanh, or nothing where it has one gate per layer."""
    saved = checkpoint(activation, heads)
    save_adapter(tmp_path / "adapter.pth", saved, "official-v1")
    state = torch.load(tmp_path / "adapter.pth", weights_only=True)
    assert len(state) == 1 + LAYERS
    loaded = load_adapter(tmp_path / "adapter.pth")
    assert torch.equal(loaded.prompts, saved.prompts)
    act = {"tanh": torch.tanh, "identity": lambda gate: gate}
    torch.testing.assert_close(act[loaded.gate_activation](loaded.gates), act[activation](saved.gates))


def test_official_v1_refuses_what_it_cannot_hold(tmp_path):
    path = tmp_path / "adapter.pth"
    with pytest.raises(CheckpointError, match="reach 1.5, which no tanh gives"):
        save_adapter(path, checkpoint("identity", gates=torch.full((4, HEADS), 1.5)), "official-v1")
    with pytest.raises(CheckpointError, match=r"adapts the topmost layers, this adapter has layers \[0, 2\]"):
        save_adapter(path, checkpoint(layers=(0, 2)), "official-v1")
    with pytest.raises(CheckpointError, match="format must be one of zinit, official-v1, .*got 'lora'"):
        save_adapter(path, checkpoint(), "lora")
    assert not path.exists()


def test_another_base_is_named():
    with pytest.raises(CheckpointError) as raised:
        checkpoint().check_base(64, 8, HEADS)
    assert str(raised.value) == (
        "the adapter is for a base of hidden size 32, 6 layers and 4 heads; this base has hidden size 64, "
        "8 layers and 4 heads"
    )
    with pytest.raises(CheckpointError, match="has 3 gates in each layer, this base has 4 heads"):
        checkpoint(heads=3, num_heads=None).check_base(HIDDEN, LAYERS, HEADS)
    one_gate = checkpoint(heads=1)
    assert one_gate.check_base(HIDDEN, LAYERS, 16) is one_gate


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


BAD_PICKLES = {
    "malicious": (
        lambda s: s | {"x": Malicious()},
        "holds Python objects beside tensors, so it was not loaded",
    ),
    "gate missing": (lambda s: without(s, "layers.3.attention.gate"), r"lacks layers\.3\.attention\.gate"),
    "key unknown": (
        lambda s: s | {"visual_proj.weight": torch.ones(2)},
        r"holds unknown visual_proj\.weight",
    ),
    "layer 99999999": (
        lambda s: s | {"layers.99999999.attention.gate": torch.ones(1)},
        r"holds unknown layers\.99999999",
    ),
    "layer 9999": (
        lambda s: s | {"layers.9999.attention.gate": torch.ones(1)},
        r"lacks layers\.6\.attention",
    ),
    "arguments": (
        lambda s: {"model": s, "args": argparse.Namespace(adapter_len="x")},
        "whole number, got 'x'",
    ),
    "no prompt length": (
        lambda s: {"model": s, "args": argparse.Namespace(adapter_len=0)},
        "positive whole number, got 0",
    ),
    "no prompts": (lambda s: without(s, "adapter_query.weight"), "no adapter in a known format"),
    "not a dictionary": (lambda s: [1, 2], "does not hold a dictionary of tensors"),
    "gate shape": (
        lambda s: {k: torch.ones(2, 2, 2) if "gate" in k and v.any() else v for k, v in s.items()},
        r"shape \(1, heads, 1, 1\) or \(1,\), got \(2, 2, 2\)",
    ),
    "integers": (
        lambda s: s | {"adapter_query.weight": torch.ones(40, HIDDEN, dtype=torch.int64)},
        "must be finite float",
    ),
    "gates differ": (lambda s: s | {"layers.5.attention.gate": torch.ones(1)}, "gates differ in shape"),
    "not finite": (
        lambda s: s | {"adapter_query.weight": torch.full((40, HIDDEN), torch.nan)},
        "must be finite",
    ),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickles(tmp_path, case, capsys):
    damage, message = BAD_PICKLES[case]
    torch.save(damage(official()), tmp_path / "adapter.pth")
    with pytest.raises(CheckpointError, match=message):
        load_adapter(tmp_path / "adapter.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("format", ["zinit", "official-v1"])
@pytest.mark.parametrize("keep", [0, 4, 20, 0.5, 0.99])
def test_truncated_files(tmp_path, format, keep):
    path = tmp_path / "adapter"
    save_adapter(path, checkpoint(), format)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="truncated"):
        load_adapter(path)


def test_damaged_metadata(tmp_path):
    from safetensors.torch import save_file

    tensors = {"prompts": torch.ones(1, 2, 3), "gates": torch.ones(1, 4)}
    known = {"format": "zinit-adapter", "version": "1", "layers": "0", "num_layers": "1", "num_heads": "4"}
    known |= {"gate_activation": "tanh"}
    cases = {
        r"metadata is damaged \('layers'\)": without(known, "layers"),
        "metadata is damaged": known | {"layers": "a,b"},
        "version 2, this program reads version 1": known | {"version": "2"},
        "must be tanh or identity, got 'relu'": known | {"gate_activation": "relu"},
        r"layers \[3\] are not layers of 1": known | {"layers": "3"},
        r"gates must have shape \(1, 1 or 5\), got \(1, 4\)": known | {"num_heads": "5"},
        "no adapter in a known format": without(known, "format"),
    }
    for message, metadata in cases.items():
        save_file(tensors, tmp_path / "adapter", metadata)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError):
        load_adapter(tmp_path / "absent")


def test_no_space_left_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    write_atomically(path, b"before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        save_adapter(path, checkpoint())
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["adapter"]
