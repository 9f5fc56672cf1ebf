"""Conversations, chat templates, and a base whose tokenizer has one."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tiny_runs import make_base

from model.loading import save_base

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_ROLES = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages if message['role'] == 'bot' or message.role == 'human' %}",
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


def messages(*texts: str, system: str = "") -> dict:
    """OpenAI's form: the user speaks first, then they take turns."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


def turns(*texts: str) -> dict:
    """ShareGPT's form."""
    return {
        "conversations": [
            {"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)
        ]
    }


CONVERSATIONS = [
    messages(f"Say {word}.", word, "Again.", f"{word} {word}") for word in ("one", "two", "three", "four")
] + [turns(f"Say {word}.", word) for word in ("five", "six", "seven", "eight")]


def chat_folder(path: Path, template: str | None = CHATML) -> Path:
    """base/ and chats.jsonl; the tokenizer has one token per ASCII character, and those of ChatML."""
    path.mkdir(exist_ok=True)
    save_base(make_base(), path / "base")
    write_tokenizer(path / "base", template)
    (path / "chats.jsonl").write_text("\n".join(map(json.dumps, CONVERSATIONS)))
    return path


def write_tokenizer(directory: Path, template: str | None = CHATML) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(code): code + 3 for code in range(126)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))  # ids 129 and 130: the base has 131 rows
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>"} | (
        {"chat_template": template} if template else {}
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
