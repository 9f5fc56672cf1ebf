"""lm-evaluation-harness with an adapter, offline: tasks, model and tokenizer are made here."""

import json
import os
import sys

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("lm_eval", reason="lm-eval is not among the test packages: pip install lm-eval==0.4.13")
pytest.importorskip("transformers")
import lm_eval  # noqa: E402
import tokenizers  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tiny_models import hf_directory  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from zinit_kernels.checkpoints import CheckpointError  # noqa: E402
from zinit_kernels.integrations import lm_eval as zinit_lm_eval  # noqa: E402
from zinit_kernels.integrations import transformers as zinit  # noqa: E402

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "sees",
    "eats",
    "under",
    "the",
    "tree",
    "house",
    "quickly",
]
TASKS = {
    "tiny_choice": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{right}}'\n",
    "tiny_answer": "output_type: generate_until\ndoc_to_target: '{{choices[right]}}'\n"
    "generation_kwargs: {until: ['tree'], max_gen_toks: 6}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ with its tokenizer, tasks/ with two tasks about the same twenty questions."""
    folder = tmp_path_factory.mktemp("lm_eval")
    hf_directory(folder / "model", "llama", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)
    questions = []
    for _ in range(20):
        row = [WORDS[i] for i in torch.randint(len(WORDS), (9,), generator=draw)]
        question, *choices = " ".join(row[:5]), row[5], row[6], " ".join(row[7:])
        questions.append(json.dumps({"question": question, "choices": choices, "right": len(questions) % 3}))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "questions.jsonl").write_text("\n".join(questions))
    for name, text in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'tasks' / 'questions.jsonl'}}}}}\n"
            f"test_split: test\ndoc_to_text: '{{{{question}}}}'\n{text}"
        )
    return folder


def adapter(folder, gate):
    """A folder of save_adapter's, every gate at the same value."""
    torch.manual_seed(1)
    model = zinit.add_zero_init_attention(hf_directory(folder / "unused", "llama"), 5, 3)
    for name, parameter in model.named_parameters():
        if name.endswith("zinit.gate"):
            torch.nn.init.constant_(parameter, gate)
    zinit.save_adapter(model, folder / f"adapter {gate}")
    return folder / f"adapter {gate}"


def answers(folder, model):
    """What the harness got from the model (log-likelihoods and texts), and the scores it made of it."""
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    done = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0)
    samples = {
        task: [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in done["samples"].items()
    }
    return samples, done["results"]


def test_gate_0_scores_as_hf_does_and_another_gate_does_not(folder):
    options = {"pretrained": str(folder / "model"), "device": "cpu", "batch_size": 4}
    expected, scores = answers(folder, HFLM(**options))
    assert len(expected["tiny_choice"]) == len(expected["tiny_answer"]) == 20
    at_rest = zinit_lm_eval.ZeroInitLM(adapter=adapter(folder, 0.0), **options)
    assert answers(folder, at_rest) == (expected, scores)
    changed, _ = answers(folder, zinit_lm_eval.ZeroInitLM(adapter=adapter(folder, 2.0), **options))
    assert all(changed[task] != expected[task] for task in TASKS)


def test_log_likelihoods_are_the_adapted_models(folder):
    source = adapter(folder, 1.0)
    model = zinit_lm_eval.ZeroInitLM(str(folder / "model"), adapter=source, device="cpu", batch_size=4)
    samples, _ = answers(folder, model)
    row = json.loads((folder / "tasks" / "questions.jsonl").read_text().splitlines()[7])
    with torch.no_grad():
        for choice, ((told, _),) in zip(row["choices"], samples["tiny_choice"][7], strict=True):
            question, whole = (
                model.tok_encode(text) for text in (row["question"], f"{row['question']} {choice}")
            )
            logits = zinit.load_adapter(hf_directory(folder / "unused"), source)(torch.tensor([whole])).logits
            steps = logits[0, len(question) - 1 : -1].log_softmax(-1)
            expected = steps.gather(1, torch.tensor(whole[len(question) :])[:, None]).sum()
            assert float(told) == pytest.approx(float(expected), abs=1e-4)


def test_the_harness_command(folder, monkeypatch, capsys):
    words = [
        "run", "--model", "zinit", "--model_args", f"pretrained={folder / 'model'},adapter={adapter(folder, 2.0)}",
        "--tasks", "tiny_choice", "--include_path", str(folder / "tasks"), "--device", "cpu",
        "--output_path", str(folder / "out.json"), "--batch_size", "4",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    zinit_lm_eval.cli_evaluate()
    assert "tiny_choice" in capsys.readouterr().out
    (written,) = folder.glob("out*.json")
    assert json.loads(written.read_text())["results"]["tiny_choice"]["acc,none"] >= 0


@pytest.mark.parametrize("adapter", [None, "nowhere/adapter.safetensors"])
def test_a_missing_adapter_is_told_before_the_model_is_loaded(adapter):
    with pytest.raises(ValueError, match="there is none at '?(None|nowhere/adapter.safetensors)'"):
        zinit_lm_eval.ZeroInitLM("no/model", adapter=adapter)


def test_an_adapter_of_another_base_is_told(folder, tmp_path):
    wide = hf_directory(tmp_path / "wide", "llama", hidden_size=128)
    zinit.save_adapter(zinit.add_zero_init_attention(wide), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="hidden size 128"):
        zinit_lm_eval.ZeroInitLM(str(folder / "model"), adapter=tmp_path / "adapter", device="cpu")
