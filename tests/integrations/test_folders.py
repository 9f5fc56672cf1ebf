"""Prompts on disk: by themselves, with their base, for the same model wrapped otherwise, and what is refused."""

import json
import logging

import pytest
import torch

transformers = pytest.importorskip("transformers")
from full_disk import fill_at  # noqa: E402
from tiny_transformers import (  # noqa: E402
    ADAPTED,
    AVAILABLE,
    DECODER,
    FIVE,
    HEADS,
    LAYERS,
    PROMPTS,
    STACKS,
    VISION,
    adapted,
    base_model,
    inputs_of,
    outputs,
)

from zinit_kernels import checkpoints  # noqa: E402
from zinit_kernels.integrations import transformers as zinit  # noqa: E402


@pytest.mark.parametrize("name", AVAILABLE)
def test_saved_adapters_are_loaded(name, tmp_path):
    model, inputs = adapted(name), inputs_of(name)
    expected = outputs(model, inputs)
    zinit.save_adapter(model, tmp_path / "adapter")
    loaded = zinit.load_adapter(base_model(name), tmp_path / "adapter")
    assert torch.equal(outputs(loaded, inputs), expected)
    assert {p for p, q in loaded.named_parameters() if q.requires_grad} == {
        p for p, _ in model.named_parameters() if ".zinit." in p
    }
    again = zinit.load_adapter(zinit.add_zero_init_attention(base_model(name), 2, 1), tmp_path / "adapter")
    assert torch.equal(outputs(again, inputs), expected)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"stacks": {}}, "is for layers none; this model has text_model.encoder.layers, vision_model.enc"),
        ({"stacks": {STACKS[0]: "0"}}, "is for layers text_model.encoder.layers; this model has text_model"),
        ({"stacks": dict.fromkeys(STACKS)}, "holds no prompts"),
        ({"model_type": "siglip"}, "is for a model of the type 'siglip'; this one is a 'clip'"),
        ({"model_type": None}, "is for a model of the type None; this one is a 'clip'"),
        ({"stacks": [STACKS[0]]}, "adapter.json is damaged: its stacks must name a file, or null"),
        (
            {"stacks": dict.fromkeys(STACKS, 1)},
            "adapter.json is damaged: its stacks must name a file, or null",
        ),
        ({"stacks": dict.fromkeys(STACKS, "../x")}, "names the file '../x', which is not inside its folder"),
    ],
    ids=["no stack", "one of two", "no prompts", "another type", "no type", "a list", "numbers", "outside"],
)
def test_a_folder_that_does_not_fit_leaves_the_adapter_in_place(config, message, tmp_path):
    model = adapted("CLIP")
    expected = outputs(model, inputs_of("CLIP"))
    zinit.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps(written | config))
    with pytest.raises(checkpoints.CheckpointError, match=message):
        zinit.load_adapter(model, tmp_path)
    assert torch.equal(outputs(model, inputs_of("CLIP")), expected)


def test_a_dtype_without_fractions_leaves_the_adapter_in_place(tmp_path):
    model = adapted("Llama")
    expected = outputs(model, inputs_of("Llama"))
    zinit.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="dtype must be a floating-point one, got torch.int8"):
        zinit.load_adapter(model, tmp_path, dtype=torch.int8)
    assert torch.equal(outputs(model, inputs_of("Llama")), expected)


@pytest.mark.skipif(not FIVE, reason="an encoder of transformers 4's CLIP is no model of its own")
def test_one_of_two_stacks_is_saved_and_loaded(tmp_path):
    model = base_model("CLIP")
    zinit.add_zero_init_attention(model.text_model, PROMPTS, ADAPTED)
    zinit.save_adapter(model, tmp_path)
    loaded = zinit.load_adapter(base_model("CLIP"), tmp_path)
    assert [row.layer for row in zinit.summary(loaded)] == [row.layer for row in zinit.summary(model)]
    assert len(zinit.summary(loaded)) == ADAPTED


@pytest.mark.parametrize("shards", ["5GB", "40KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("name", ["Llama", "CLIP"])
def test_prompts_saved_with_the_base_are_read_back(name, activation, shards, tmp_path):
    """By save_pretrained, as in Trainer's checkpoints. from_pretrained leaves them out, with a warning of its own."""
    model, inputs = adapted(name, gate_activation=activation), inputs_of(name)
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert "zinit" not in str(loaded)
    with zinit.disable_zero_init_attention(model):
        assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert torch.equal(outputs(zinit.load_adapter(loaded, tmp_path), inputs), expected)


@pytest.mark.parametrize("name", ["Llama", "CLIP"])
def test_transformers_warning_of_lost_prompts_says_how_to_read_them(name, tmp_path):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(handler)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()  # the programs of other tests ask for errors alone
    try:
        for model in (adapted(name), base_model(name)):
            model.save_pretrained(tmp_path)
            type(model).from_pretrained(tmp_path)
    finally:
        transformers_logger.removeHandler(handler)
        transformers.logging.set_verbosity(level)
    (warning,) = [text for text in said if ".zinit." in text]
    assert warning.endswith("load_adapter(model, folder) of zinit_kernels.integrations.transformers reads them from "
                            "the same folder.")  # fmt: skip
    with pytest.raises(
        ValueError, match=r"add_zero_init_attention\(model\) first, or load_adapter\(model, folder\)"
    ):
        zinit.save_adapter(type(model).from_pretrained(tmp_path), tmp_path / "adapter")


def test_prompts_saved_by_peft_beside_its_own_weights(tmp_path):
    """PEFT loads its own, and leaves the prompts out without a word where the base has none."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["zinit"], init_lora_weights=False)
    model, inputs = peft.get_peft_model(adapted("Llama"), config).eval(), inputs_of("Llama")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model("Llama"), tmp_path).eval()
    assert not torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    by_transformers = base_model("Llama")
    by_transformers.load_adapter(tmp_path)
    for one in (loaded, by_transformers.eval()):
        assert torch.equal(outputs(zinit.load_adapter(one, tmp_path), inputs), outputs(model, inputs))
    for other in (base_model("Llama"), peft.get_peft_model(base_model("Llama"), config)):
        with pytest.raises(
            checkpoints.CheckpointError, match="also holds .* of peft .*load them first, by PeftModel"
        ):
            zinit.load_adapter(other, tmp_path)


def test_a_folder_of_a_model_fits_its_body(tmp_path):
    model = adapted("GPT-2")
    zinit.save_adapter(model, tmp_path)
    body = zinit.load_adapter(base_model("GPT-2").transformer, tmp_path)  # h, in the model transformer.h
    assert [row[1:] for row in zinit.summary(body)] == [row[1:] for row in zinit.summary(model)]


def test_stacks_that_transformers_writes_by_other_names(tmp_path):
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**DECODER)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    kind = transformers.LlavaForConditionalGeneration
    model = zinit.add_zero_init_attention(kind(config), PROMPTS, ADAPTED)
    model.save_pretrained(tmp_path)
    loaded = zinit.load_adapter(kind.from_pretrained(tmp_path), tmp_path)
    assert zinit.summary(loaded) == zinit.summary(model) and len(zinit.summary(loaded)) == 2 * ADAPTED


def test_a_state_dict_of_another_gate_activation_is_refused():
    tanh, identity = adapted("Llama"), adapted("Llama", gate_activation="identity")
    with pytest.raises(RuntimeError, match="Missing key.*zinit.identity_gate"):
        identity.load_state_dict(tanh.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key.*zinit.identity_gate"):
        tanh.load_state_dict(identity.state_dict())


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


WRAPPED = {
    "LoRA": lora,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "the body": lambda model: model.model,
    "another head": lambda model: transformers.LlamaForSequenceClassification(model.config),
}


@pytest.mark.parametrize("saved_wrapped", [False, True], ids=["saved plain", "saved wrapped"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_folder_fits_the_same_model_wrapped_otherwise(wrapper, saved_wrapped, tmp_path):
    wrap = WRAPPED[wrapper]
    models = [adapted("Llama"), base_model("Llama")]
    if saved_wrapped:
        model = zinit.add_zero_init_attention(wrap(base_model("Llama")), PROMPTS, ADAPTED)
        zinit.save_adapter(model, tmp_path)
        assert "base_model" not in (tmp_path / "adapter.json").read_text()  # nor any other wrapper's name
        loaded = zinit.load_adapter(models[1], tmp_path)
    else:
        model = models[0]
        zinit.save_adapter(model, tmp_path)
        loaded = zinit.load_adapter(wrap(models[1]), tmp_path)
    found, expected = zinit.summary(loaded), zinit.summary(model)
    assert [row[1:] for row in found] == [row[1:] for row in expected] and len(found) == ADAPTED


def test_a_folder_of_before_a_tower_could_be_adapted_leaves_it_out(tmp_path):
    """Folders name every stack of layers; SigLIP's had no row when the first ones were written."""
    model = base_model("SigLIP")
    zinit.add_zero_init_attention(model, PROMPTS, ADAPTED)
    zinit.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter.json").read_text())
    written["stacks"] = {STACKS[0]: written["stacks"][STACKS[0]]}
    (tmp_path / "adapter.json").write_text(json.dumps(written))
    rows = zinit.summary(zinit.load_adapter(base_model("SigLIP"), tmp_path))
    assert [row.layer.startswith("text_model") for row in rows] == [True] * ADAPTED


def test_every_official_adapter_fits_a_llama(tmp_path):
    heads = torch.randn(ADAPTED, HEADS)
    made = checkpoints.AdapterCheckpoint(torch.randn(ADAPTED, 10, 32), heads, "tanh", (1, 2), LAYERS, HEADS)
    checkpoints.save_adapter(tmp_path / "v1.pth", made, "official-v1")
    model = zinit.load_adapter(base_model("Llama"), tmp_path / "v1.pth")
    assert torch.equal(torch.tensor([row.gates for row in zinit.summary(model)]), heads.tanh())
    raw = zinit.load_adapter(base_model("Llama"), tmp_path / "v1.pth", gate_activation="identity")
    assert torch.equal(torch.tensor([row.gates for row in zinit.summary(raw)]), heads)


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    """Not with a new file for one stack beside an old one for the other."""
    zinit.save_adapter(adapted("CLIP", gates=1.0), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3
    for number in (1, 2, 3):
        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
            fill_at(patched, number)
            zinit.save_adapter(adapted("CLIP", gates=2.0), tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_adapter_of_another_base_is_told_and_touches_nothing(tmp_path):
    zinit.save_adapter(adapted("Llama"), tmp_path / "llama")
    wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER | {"hidden_size": 64}))
    with pytest.raises(
        checkpoints.CheckpointError, match="hidden size 32, 3 layers and 4 heads; this base has hidden"
    ):
        zinit.load_adapter(wide, tmp_path / "llama")
    with pytest.raises(
        checkpoints.CheckpointError, match="is for layers model.layers; this model has transformer.h"
    ):
        zinit.load_adapter(base_model("GPT-2"), tmp_path / "llama")
    with pytest.raises(
        checkpoints.CheckpointError, match="has several stacks of layers: text_model.encoder.layers"
    ):
        zinit.load_adapter(base_model("CLIP"), tmp_path / "llama" / "adapter.safetensors")
    (tmp_path / "llama" / "adapter.json").write_text("{}")
    with pytest.raises(checkpoints.CheckpointError, match="adapter.json is damaged"):
        zinit.load_adapter(wide, tmp_path / "llama")
    assert wide.config._attn_implementation == "sdpa" and all(p.requires_grad for p in wide.parameters())
