"""An accelerated PEFT adapter with transformers' Trainer, in about a minute and without downloads.

    python examples/peft_trainer.py [--fast]

The example first trains a small Llama that answers "word >" in one of four styles, chosen by chance: as it is, in
capitals, spaced, or between stars. Then the base is frozen, and adaption prompts learn from records of one style
alone. Prints how often the whole answer is in that style, before and after.
"""

from __future__ import annotations

import argparse
import random
import string
import tempfile

import torch
from peft import AdaptionPromptConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from zinit_kernels.console import run
from zinit_kernels.integrations.peft import accelerate

STYLES = {
    "as it is": lambda word: word,
    "capitals": str.upper,
    "spaced": lambda word: " ".join(word),
    "stars": lambda word: f"*{word}*",
}
WANTED, LENGTH = "stars", 20
PAD, END = 0, 10  # token ids are ASCII codes; a line ends an answer


def record(rng: random.Random, style: str) -> tuple[str, str]:
    word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 5)))
    return f"{word} >", STYLES[style](word) + "\n"


def example(instruction: str, answer: str) -> dict[str, list[int]]:
    """Right-padded token ids; the loss is on the answer."""
    ids = [*instruction.encode(), *answer.encode()]
    labels = [-100] * len(instruction) + ids[len(instruction) :]
    padding = LENGTH - len(ids)
    return {
        "input_ids": ids + [PAD] * padding,
        "attention_mask": [1] * len(ids) + [0] * padding,
        "labels": labels + [-100] * padding,
    }


def fit(model: torch.nn.Module, data: list[dict[str, list[int]]], steps: int, learning_rate: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=48, max_steps=steps, learning_rate=learning_rate, use_cpu=True,
            lr_scheduler_type="cosine", warmup_steps=steps // 10, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train()
    model.eval()


def in_style(model: torch.nn.Module, records: list[tuple[str, str]]) -> float:
    """The share of records whose greedy answer is the wanted one, to the last character."""
    right = 0
    for instruction, answer in records:
        ids = torch.tensor([list(instruction.encode())])
        out = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False
        )
        right += bytes(out[0, ids.shape[1] :].tolist()).decode("ascii", "replace") == answer
    return right / len(records)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="fewer steps, for a test")
    fast = parser.parse_args().fast
    torch.manual_seed(0)
    rng = random.Random(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=128,
            max_position_embeddings=64, pad_token_id=PAD, bos_token_id=None, eos_token_id=END,
        )
    )  # fmt: skip
    print("training a base that knows four styles of answer ...", flush=True)
    mixed = [example(*record(rng, rng.choice(list(STYLES)))) for _ in range(20_000)]
    fit(base, mixed, 400 if fast else 1500, 4e-3)

    held_out = [record(rng, WANTED) for _ in range(50)]
    ids = torch.tensor([example(*row)["input_ids"] for row in held_out])
    with torch.no_grad():
        expected = base(ids).logits
    before = in_style(base, held_out)
    prompts = AdaptionPromptConfig(adapter_len=10, adapter_layers=3, task_type="CAUSAL_LM")
    model = accelerate(get_peft_model(base, prompts)).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected), (
            "at step 0 the adapted model is the base, bit for bit"
        )

    print(f"adapting it to {WANTED!r} ...", flush=True)
    fit(model.train(), [example(*record(rng, WANTED)) for _ in range(5_000)], 150 if fast else 300, 2e-2)
    after = in_style(model, held_out)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{'':<10}{'trained numbers':>16}{'answers in style':>18}")
    print(f"{'base':<10}{0:>16,}{before:>18.0%}")
    print(f"{'adapted':<10}{trained:>16,}{after:>18.0%}")
    assert after > before + 0.2, "the adapter learned nothing"


if __name__ == "__main__":
    run(main)
