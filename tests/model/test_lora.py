"""LoRA in the place of the adapter: the same program, and a folder that PEFT reads."""

from __future__ import annotations

import sys

import pytest
import torch
from full_disk import fill_at
from tiny_runs import CONFIG, arguments, contents, losses_of, make_base, power_cut, run

from model import train
from model.errors import UserError
from model.fingerprint import base_fingerprint, first_fingerprint
from model.loading import load_base
from model.lora import Lora, LoraChoice, save_lora
from model.run_folder import read_metrics

peft = pytest.importorskip("peft")


def words(folder, output, *more):
    made = arguments(folder, output, *more)
    place = made.index("--prompt-length")
    return [*made[:place], *made[place + 2 :], "--method", "lora", "--rank", "2"]


@pytest.fixture(scope="module")
def lora_run(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("lora") / "out"
    assert run(*words(folder, output)) == 0
    return output


def test_peft_reads_what_was_trained(folder, lora_run):
    """transformers' model of the same base, with PEFT's own loading, gives our logits."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    before = theirs(torch.tensor([[1, 40, 50, 60]])).logits
    theirs = peft.PeftModel.from_pretrained(theirs, lora_run / "lora").eval()
    base = load_base(folder / "base").freeze()
    lora = Lora(base, LoraChoice(rank=2), seed=0)
    lora.load_state_dict(torch.load(lora_run / "checkpoint.pt", weights_only=True)["adapter"])
    tokens = torch.tensor([[1, 40, 50, 60]])
    with torch.no_grad():
        ours, expected = base(tokens, lora), theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2


def test_a_full_disk_leaves_weights_and_settings_as_they_were(tmp_path, monkeypatch):
    """lora_alpha stands in the settings: beside other weights it scales them wrongly, and nothing shows it."""
    save_lora(tmp_path, Lora(make_base(), LoraChoice(rank=2), seed=0), "base")
    before = contents(tmp_path)
    fill_at(monkeypatch, 2)
    with pytest.raises(
        UserError, match="adapter_config.json: No space left on device; the file that was there"
    ):
        save_lora(tmp_path, Lora(make_base(), LoraChoice(rank=2, alpha=64), seed=1), "base")
    assert contents(tmp_path) == before


def test_a_run_leaves_the_folder_and_resumes_exactly(folder, lora_run, tmp_path):
    names = {path.name for path in lora_run.iterdir()}
    assert names == {"lora", "checkpoint.pt", "metrics.jsonl", "loss.png", "layers.png", "config.yaml"}
    entries = [entry for entry in read_metrics(lora_run / "metrics.jsonl") if "loss" in entry]
    for entry in entries:
        norms = torch.tensor(entry["layer_grad_norms"])
        assert len(norms) == 4 and norms.norm().item() == pytest.approx(entry["grad_norm"])
    output = tmp_path / "out"
    with power_cut(save=4):
        train.main(words(folder, output, "--save-every", "1"))
    assert run(*words(folder, output), "--resume") == 0
    assert losses_of(output) == losses_of(lora_run)
    assert contents(output / "lora") == contents(lora_run / "lora")


def test_the_base_begins_as_it_is_and_is_known_again():
    base = make_base()
    tokens = torch.tensor([[1, 5, 9]])
    before, prints = base(tokens), (base_fingerprint(base), first_fingerprint(base))
    lora = Lora(base, LoraChoice(rank=3, targets=("k_proj", "down_proj")), seed=1)
    assert torch.equal(base(tokens, lora), before)
    assert (base_fingerprint(base), first_fingerprint(base)) == prints
    hidden, inner = CONFIG.hidden_size, CONFIG.intermediate_size
    kv = CONFIG.num_heads_kv * CONFIG.head_dim
    assert lora.num_parameters == CONFIG.num_layers * 3 * (hidden + kv + inner + hidden)
    again = Lora(make_base(), LoraChoice(rank=3, targets=("k_proj", "down_proj")), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), again.parameters(), strict=True))


BAD = {
    ("--method", "lora", "--prompt-length", "3"): "--prompt-length has no effect with --method lora",
    ("--rank", "3"): "--rank has no effect with --method adapter",
    ("--method", "lora", "--rank", "0"): "--rank must be at least 1, got 0",
    ("--method", "lora", "--lora-alpha", "-1"): "--lora-alpha must be above 0, got -1.0",
    (
        "--method",
        "lora",
        "--lora-targets",
        "q_proj,lm_head",
    ): "--lora-targets 'lm_head': the linear layers are q_proj",
    ("--method", "lora", "--format", "official-v1"): "--format has no effect with --method lora",
    ("--method", "lora", "--tensor-parallel", "2"): "which --tensor-parallel cuts: take --shard instead",
}


@pytest.mark.parametrize("more", BAD)
def test_options_of_the_other_method_are_refused(folder, tmp_path, capsys, more):
    made = ["--base", folder / "base", "--data", folder / "data.jsonl", "--out", tmp_path / "out", *more]
    assert run(*map(str, made)) == 2
    assert BAD[more] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_peft_missing_is_named(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run(*words(folder, tmp_path / "out")) == 2
    assert "pip install 'zinit-kernels[lora]'" in capsys.readouterr().err
