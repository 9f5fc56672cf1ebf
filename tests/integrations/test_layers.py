"""Whose prompts a model has: those in use, of either package, wherever PEFT or Accelerate keeps them."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
accelerate_hooks = pytest.importorskip("accelerate")
from peft import LoraConfig, get_peft_model  # noqa: E402
from tiny_peft import CONFIGS, batch  # noqa: E402
from tiny_peft import adapted as peft_adapted  # noqa: E402
from tiny_transformers import ADAPTED, FIVE, adapted, base_model, inputs_of  # noqa: E402

from zinit_kernels.integrations import peft  # noqa: E402
from zinit_kernels.integrations import transformers as zinit  # noqa: E402

IDS = batch("whole", rows=2)["input_ids"]


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def peft_model():
    return peft_adapted(CONFIGS["llama-gqa"], gates=2.0, adapters=("default", "second"))


def lora(model, **options):
    return get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"]} | options)).eval()


def test_accelerated_peft_models_are_disabled_too():
    model = peft.accelerate(peft_model())
    with model.disable_adapter():
        base = logits(model)
    plain = logits(model)
    with zinit.disable_zero_init_attention(model):
        assert torch.equal(logits(model), base)
        assert torch.equal(logits(model, adapter_names=["second", "default"]), base)
        assert torch.equal(logits(copy.deepcopy(model)), plain), "a copy is nobody's that was disabled"
        model.set_adapter("second")
        assert torch.equal(logits(model), base)
        model.set_adapter("default")
        model.base_model.model.set_attn_implementation("sdpa")  # PEFT's own computation
        torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
        model.base_model.model.set_attn_implementation("zinit")
    assert torch.equal(logits(model), plain) and not torch.equal(plain, base)
    peft.restore(model)
    assert not any("token" in vars(module) for module in model.modules())


@pytest.mark.skipif(not FIVE, reason="generate_batch of transformers 4 needs a GPU")
def test_the_base_of_a_peft_model_is_served_in_a_block():
    model = peft.accelerate(peft_model())
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    options = {"input_ids": IDS[:1, :5], "max_new_tokens": 4, "do_sample": False}
    with zinit.disable_zero_init_attention(model):
        base = model.generate(**options)[0, 5:].tolist()
        (served,) = model.generate_batch([IDS[0, :5].tolist()], config, room).values()
    assert served.generated_tokens == base != model.generate(**options)[0, 5:].tolist()


@pytest.mark.parametrize("accelerated", [False, True])
def test_prompts_of_peft_are_listed_and_trained(accelerated):
    model = peft.accelerate(peft_model()) if accelerated else peft_model()
    rows = zinit.summary(model)
    layers = [module for module in model.modules() if hasattr(module, "adaption_gate")]
    assert [row.gates for row in rows] == [layer.adaption_gate.tolist() for layer in layers]
    assert [row.prompt_length for row in rows] == [4, 4, 4] and rows[0].prompt_rms > 0.5
    prompts, gates = zinit.parameter_groups(model, 1e-3)
    assert {id(p) for group in (prompts, gates) for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert gates["weight_decay"] == 0 and all(gate.numel() == 1 for gate in gates["params"])


def test_what_is_pefts_alone_is_told(tmp_path):
    stock = peft_model()
    with pytest.raises(
        ValueError, match=r"PEFT's adaption prompts: call accelerate\(model\).*disable_adapter"
    ):
        zinit.disable_zero_init_attention(stock).__enter__()
    for model in (stock, peft.accelerate(peft_model())):
        for call in (zinit.remove_zero_init_attention, lambda m: zinit.save_adapter(m, tmp_path / "made")):
            with pytest.raises(
                ValueError, match="PEFT's to save and to take away: save_pretrained, delete_ad"
            ):
                call(model)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("saved", ["zinit", "self_attn", "layers.2"])
def test_copies_that_are_not_in_use_are_left_out(saved, tmp_path):
    """modules_to_save keeps the module of before beside the copy that it trains, also of a whole layer."""
    model = lora(adapted("Llama"), modules_to_save=[saved], target_modules=r".*layers\.[01].*down_proj")
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name and name.endswith("zinit.gate" if saved != "zinit" else "gate"):
            parameter.data.mul_(-3)
    ids = inputs_of("Llama")["input_ids"]
    changed, rows = logits(model, ids), zinit.summary(model)
    assert len(rows) == len(zinit.parameter_groups(model, 1e-3)[0]["params"]) == ADAPTED
    zinit.save_adapter(model, tmp_path)
    loaded = zinit.load_adapter(base_model("Llama"), tmp_path)
    assert torch.equal(logits(loaded, ids), changed)
    assert [row[1:] for row in zinit.summary(loaded)] == [row[1:] for row in rows]
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(adapted("Llama"), ids))
        assert zinit.summary(model) != rows


def test_rows_of_a_batch_have_the_prompts_of_their_modules_to_save():
    model, ids = lora(adapted("Llama"), modules_to_save=["zinit"]), inputs_of("Llama")["input_ids"]
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], modules_to_save=["zinit"]))
    for name, parameter in model.named_parameters():
        if "modules_to_save.second.gate" in name:
            parameter.data.mul_(-3)
    assert_rows_are_their_adapters(model, ids, ["second", "__base__", "default"])
    with zinit.disable_zero_init_attention(model):
        assert_rows_are_their_adapters(model, ids, ["second", "__base__", "default"])


def test_rows_of_a_batch_project_the_prompts_by_their_own_lora():
    config = LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model, ids = get_peft_model(adapted("Llama", gates=2.0), config).eval(), inputs_of("Llama")["input_ids"]
    model.add_adapter("second", config)
    assert_rows_are_their_adapters(model, ids, ["second", "__base__", "default"])


def assert_rows_are_their_adapters(model, ids, names):
    found = logits(model, ids, adapter_names=names)
    options = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                right, answer = logits(model, ids), model.generate(input_ids=ids, **options)
        else:
            model.set_adapter(name)
            right, answer = logits(model, ids), model.generate(input_ids=ids, **options)
        torch.testing.assert_close(found[row], right[row], rtol=0, atol=1e-5)
        assert torch.equal(tokens[row], answer[row])


def test_offloaded_prompts_are_listed_and_saved(tmp_path):
    for model in (adapted("Llama"), peft.accelerate(peft_model())):
        rows = zinit.summary(model)
        accelerate_hooks.cpu_offload(model, torch.device("cpu"))
        assert zinit.summary(model) == rows
        assert all(parameter.is_meta for parameter in model.parameters())
    model = adapted("Llama")
    accelerate_hooks.cpu_offload(model, torch.device("cpu"))
    zinit.save_adapter(model, tmp_path)
    assert zinit.summary(zinit.load_adapter(base_model("Llama"), tmp_path)) == zinit.summary(adapted("Llama"))
