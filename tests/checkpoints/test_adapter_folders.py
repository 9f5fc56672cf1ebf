"""Where an adapter is found in a folder, and in a model that was saved with its prompts."""

import json
import os
from dataclasses import replace

import pytest
import torch
from adapter_files import (
    HEADS,
    HIDDEN,
    LENGTH,
    checkpoint,
    litgpt,
    model_state,
    normal,
    ours,
    peft,
    sharded,
    write_peft,
)
from safetensors.torch import save_file

from zinit_kernels import convert, inspect
from zinit_kernels.checkpoints import CheckpointError, load_adapter, save_adapter

ADAPTED, LAYERS = (1, 2), 3


def assert_is_that_of(loaded, state, stack="model.layers", attention="self_attn"):
    assert (loaded.layers, loaded.num_layers, loaded.num_heads) == (ADAPTED, LAYERS, HEADS)
    for row, layer in enumerate(ADAPTED):
        assert torch.equal(loaded.prompts[row], state[f"{stack}.{layer}.{attention}.zinit.prompt"])
        assert torch.equal(loaded.gates[row], state[f"{stack}.{layer}.{attention}.zinit.gate"])


@pytest.mark.parametrize("form", ["file", "folder", "shards", "bin", "fsdp"])
def test_a_models_checkpoint(tmp_path, form):
    state = model_state()
    if form == "shards":
        sharded(tmp_path, state)
    elif form in ("bin", "fsdp"):
        torch.save(state, tmp_path / ("pytorch_model.bin" if form == "bin" else "pytorch_model_fsdp.bin"))
    else:
        save_file(state, tmp_path / "model.safetensors")
    loaded = load_adapter(tmp_path / "model.safetensors" if form == "file" else tmp_path)
    assert_is_that_of(loaded, state)
    assert loaded.gate_activation == "tanh" and not loaded.extras
    save_adapter(tmp_path / "out", loaded)
    assert_is_that_of(load_adapter(tmp_path / "out"), state)
    with pytest.raises(CheckpointError, match="format must be one of zinit, .*litgpt, got 'trainer'"):
        save_adapter(tmp_path / "out", loaded, "trainer")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("self_attn.", "_fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."),
        lambda name: f"base_model.model.{name}",
    ],
)
def test_wrappers_add_to_the_names(tmp_path, wrap):
    state = model_state()
    save_file({wrap(name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert_is_that_of(load_adapter(tmp_path), state)


def test_gates_that_are_applied_as_they_are_are_marked(tmp_path):
    save_file(model_state(identity=True), tmp_path / "model.safetensors")
    assert load_adapter(tmp_path).gate_activation == "identity"
    assert load_adapter(tmp_path, gate_activation="tanh").gate_activation == "tanh"
    state = model_state(identity=True)
    del state["model.layers.1.self_attn.zinit.identity_gate"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="some layers apply their gates as they are"):
        load_adapter(tmp_path)


def test_lora_beside_the_prompts_is_not_lost(tmp_path):
    """The base was changed too, so prompts and gates alone are another model."""
    (tmp_path / "model").mkdir()
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": normal(4, HIDDEN)}
    prompts = {
        f"base_model.model.{name}": tensor for name, tensor in model_state().items() if "zinit" in name
    }
    save_file(prompts | lora, tmp_path / "adapter_model.safetensors")
    save_file(model_state() | lora, tmp_path / "model" / "model.safetensors")
    for path in (tmp_path, tmp_path / "model"):
        loaded = load_adapter(path)
        assert loaded.extras.keys() == lora.keys()
        with pytest.raises(CheckpointError, match="not the whole adapter: it also has 1 tensors of peft"):
            loaded.check_base(HIDDEN, LAYERS, HEADS)


def test_several_stacks_of_layers(tmp_path, capsys):
    vision, text = (
        model_state("vision_model.encoder.layers"),
        model_state("text_model.encoder.layers", layers=4),
    )
    save_file(vision | text, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"pass --stack \(stack=\) with one of text_model.*, vision_model"
    ):
        load_adapter(tmp_path)
    loaded = load_adapter(tmp_path, stack="vision_model.encoder.layers")
    assert_is_that_of(loaded, vision, "vision_model.encoder.layers")
    assert load_adapter(tmp_path, stack="text_model.encoder.layers").num_layers == 4
    with pytest.raises(CheckpointError, match="not in audio"):
        load_adapter(tmp_path, stack="audio")
    words = [str(tmp_path), str(tmp_path / "out"), "--stack", "vision_model.encoder.layers"]
    assert convert.main(words) == 0 and inspect.main(words[:1] + words[2:]) == 0
    assert "3, hidden size 32" in capsys.readouterr().out


def test_a_damaged_models_checkpoint(tmp_path):
    def refused(state, message):
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_adapter(tmp_path)

    state, zinit = model_state(), "model.layers.1.self_attn.zinit."
    refused({k: t for k, t in state.items() if k != zinit + "gate"}, r"lacks 1\.zinit\.gate")
    refused(state | {zinit + "gate": normal(7)}, "the layers' gates differ in shape")
    refused(state | {zinit + "prompt": normal(LENGTH, 8)}, "the layers' prompts differ in shape")
    refused(state | {f"module.{zinit}gate": normal(HEADS)}, "for one layer")
    refused(state | {"x.zinit.gate": normal(HEADS)}, "is in no numbered layer")
    refused({k: t[None] if "gate" in k else t for k, t in state.items()}, r"must have shape \(heads,\)")
    refused({k: t for k, t in state.items() if "zinit" not in k}, "is no adapter in a known format")


FOLDERS = {  # what a folder holds -> what is found there, or the sentence
    "training": ({"adapter.safetensors": "ours", "checkpoint.pt": b"", "metrics.jsonl": b""}, "ours"),
    "training, official": ({"adapter.pth": "ours", "checkpoint.pt": b""}, "ours"),
    "litgpt": ({"lit_model.pth.adapter": "litgpt", "model_config.yaml": b""}, "litgpt"),
    "peft": ({"adapter_model.safetensors": "peft"}, "peft"),
    "peft twice": ({"adapter_model.safetensors": "peft", "adapter_model.bin": b"never read"}, "peft"),
    "prompts beside the model they were trained in": (
        {"adapter.safetensors": "ours", "model.safetensors": b"never read"},
        "ours",
    ),
    "two adapters": (
        {"adapter.safetensors": "ours", "adapter_model.safetensors": "peft"},
        "holds several adapters, adapter.safetensors, adapter_model.safetensors: name the file",
    ),
    "nothing": ({}, "is a folder without adapter_model.safetensors, adapter.safetensors or another adapter"),
    "no epoch yet": ({"checkpoint.pt": b""}, "its run has not finished an epoch"),
    "a run": (
        {"checkpoint-4/model.safetensors": b"", "checkpoint-8/model.safetensors": b""},
        "name one of the checkpoints in it, checkpoint-4, checkpoint-8",
    ),
    "a run of litgpt": (
        {"step-000100/lit_model.pth.adapter": b"", "step-000200/lit_model.pth.adapter": b""},
        "name one of the checkpoints in it, step-000100, step-000200",
    ),
    "accelerate's": (
        {"checkpoint_0/model.safetensors": b""},
        "name one of the checkpoints in it, checkpoint_0",
    ),
    "several of PEFT": (
        {"French/adapter_model.safetensors": b"", "Latin/adapter_model.safetensors": b"", "README.md": b""},
        "name one of the folders in it, French, Latin",
    ),
    "a name of its own": (
        {"lit-llama-adapter-finetuned.pth": b"", "log.txt": b""},
        "by its usual name: name the file, lit-llama-adapter-finetuned.pth",
    ),
    "stacks": (
        {"adapter.vision.safetensors": b"", "adapter.text.safetensors": b""},
        "name one of its stacks of layers, adapter.text.safetensors",
    ),
    "FSDP": ({"pytorch_model_fsdp_0/__0_0.distcp": b""}, "join them first"),
    "FSDP's": ({"__0_0.distcp": b"", ".metadata": b""}, "join them first"),
    "DeepSpeed": ({"global_step4/mp_rank_00_model_states.pt": b""}, "zero_to_fp32"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tmp_path, case):
    files, expected = FOLDERS[case]
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "peft":
            save_file(peft(), path)
        elif content == "litgpt":
            torch.save(litgpt(), path)
        else:
            save_adapter(path, ours(), "official-v1" if name.endswith(".pth") else "zinit")
    if expected in ("ours", "peft", "litgpt"):
        assert load_adapter(tmp_path, layout="blocked").layers == ours().layers
        return
    with pytest.raises(CheckpointError) as raised:
        load_adapter(tmp_path)
    assert expected in str(raised.value)


OUTSIDE = [
    "/etc/hostname", "../outside.safetensors", "a/../../outside.safetensors", "", "a\0b", "..\\x", "C:\\x", "C:x",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leaves_its_folder(tmp_path, name):
    state = model_state()
    save_file(state, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    sharded(folder, state)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {next(iter(places)): name}}))
    with pytest.raises(CheckpointError, match="which is not inside its folder"):
        load_adapter(folder)


def test_an_index_may_lead_into_folders_and_through_links(tmp_path):
    """Hugging Face's cache: a folder of links to files elsewhere."""
    state, folder = model_state(), tmp_path / "snapshot"
    folder.mkdir()
    sharded(folder, state, places=dict.fromkeys(state, "part/model-0.safetensors"))
    os.rename(folder / "part" / "model-0.safetensors", tmp_path / "blob")
    (folder / "part" / "model-0.safetensors").symlink_to(tmp_path / "blob")
    assert_is_that_of(load_adapter(folder), state)


def test_an_index_that_names_itself_or_something_twice(tmp_path):
    state = model_state()
    sharded(tmp_path, state)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, index.name)}))
    with pytest.raises(CheckpointError, match="truncated"):
        load_adapter(tmp_path)
    for n in (0, 1):
        save_file(state, tmp_path / f"model-{n}.safetensors")
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match="is in two shards"):
        load_adapter(tmp_path)


def test_peft_names_what_its_configuration_contradicts(tmp_path):
    write_peft(tmp_path / "a", peft(), peft_type="LORA")
    with pytest.raises(CheckpointError, match="says peft_type = 'LORA', the weights say 'ADAPTION_PROMPT'"):
        load_adapter(tmp_path / "a")


def test_what_a_file_says_is_kept_with_its_folder(tmp_path):
    save_adapter(tmp_path / "adapter.safetensors", checkpoint(metadata={"base": "tiny"}))
    assert load_adapter(tmp_path).metadata == {"base": "tiny"}
    assert replace(load_adapter(tmp_path), metadata={}).num_layers == 6


def test_the_state_of_a_run_is_called_what_it_is(tmp_path):
    torch.save({"step": 3, "adapter": {}, "optimizer": {}, "run": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(
        CheckpointError, match="is the state of a training run: the adapter is the file beside"
    ):
        load_adapter(tmp_path / "checkpoint.pt")
