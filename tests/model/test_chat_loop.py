"""The conversation in the terminal: every answer is generate()'s for what was said so far."""

import io
import json
import sys

import pytest
from tiny_runs import make_base, write_tokenizer
from tiny_serving import ADAPTERS, TEMPLATE, make_adapters

from model.adapter_files import save_adapter
from model.chat import encode_chat
from model.chat_loop import Conversation, run
from model.errors import UserError, run_program
from model.generate import main
from model.loading import load_base, save_base
from model.sampling import generate
from model.serving.request import Sampling
from model.tokenizer import load_tokenizer

GREEDY = Sampling(max_new_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "base"
    base = make_base()
    save_base(base, folder)
    write_tokenizer(folder)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, adapter in make_adapters(base.config).items():
        save_adapter(folder.parent / f"{name}.safetensors", adapter, base.config)
    return folder


def start(folder, written, **options):
    base = load_base(folder).freeze()
    adapters = make_adapters(base.config)
    given = {name: (base, adapters[name]) for name in ADAPTERS}
    tokenizer = load_tokenizer(folder)
    made = Conversation(base, tokenizer, given, GREEDY, **options, write=written.append)

    def expected(messages, name):
        ids = encode_chat(tokenizer, messages)
        return tokenizer.decode(
            generate(base, [ids], adapters.get(name), max_new_tokens=20, temperature=0)[0]
        )

    return made, expected


def test_history_commands_and_adapters(base_folder):
    written = []
    talk, expected = start(base_folder, written)
    first = talk.say("Hello.")
    messages = [{"role": "user", "content": "Hello."}]
    assert first == expected(messages, "tall") and "".join(written).endswith("\n")
    computed = talk.answerers["tall"].engine.counts["computed_tokens"]
    assert talk.command("/adapter short")
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And?"}]
    assert talk.say("And?") == expected(messages, "short")
    assert talk.command("/reset") and talk.messages == []
    assert talk.command("/adapter base")
    assert talk.say("Hello.") == expected(messages[:1], "base")
    for line, answer in (
        ("/adapter none", "there is no adapter 'none'; there are: base, tall"),
        ("/x", "/reset forgets"),
    ):
        assert talk.command(line) and answer in written[-1]
    assert not talk.command("/quit") and computed > 0


def test_a_second_message_computes_what_is_new(base_folder):
    talk, _ = start(base_folder, [])
    talk.say("Tell me of the fox and of the dog, please.")
    engine = talk.answerers["tall"].engine
    shared = engine.scheduler.shared
    talk.say("And?")
    assert engine.scheduler.shared - shared >= 48


def test_a_long_conversation_forgets_its_beginning(base_folder):
    written = []
    talk, expected = start(base_folder, written)
    for _ in range(6):
        talk.say("x" * 80)
    assert any("its beginning is forgotten" in text for text in written)
    assert talk.messages[0]["role"] == "user" and len(talk.messages) < 12
    with pytest.raises(UserError, match="longer than the model's context of 512 tokens"):
        talk.say("x" * 600)
    kept = talk.messages
    talk.say("Go on.")
    assert talk.messages[-1]["content"] == expected(talk.messages[:-1], "tall")
    assert len(kept) > 0


def test_an_interrupt_ends_the_answer_alone(base_folder, monkeypatch):
    written = []
    talk, _ = start(base_folder, written)
    engine = talk.answerers["tall"].engine
    step, steps = engine.step, []

    def interrupted():
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    said = talk.say("Hello.")
    assert 0 < len(said) < 20 and engine.pool.available == engine.pool.num_pages
    lines = iter(["Hello.", "", "/quit", "never"])
    run(talk, lambda prompt: next(lines))
    assert next(lines) == "never" and len(talk.messages) == 4


def program(capsys, monkeypatch, text, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: main([str(option) for option in options]))
    return ended.value.code, *capsys.readouterr()


def test_the_program(base_folder, capsys, monkeypatch):
    file = base_folder.parent / "tall.safetensors"
    asked = ["--base", base_folder, "--chat", "--temperature", 0, "--max-new-tokens", 20, "--device", "cpu"]
    _, expected = start(base_folder, [])
    text = "Hello.\n/reset\n/adapter other\nHello.\n"
    code, out, told = program(
        capsys,
        monkeypatch,
        text,
        *asked,
        "--adapter",
        file,
        "--adapter",
        f"other={base_folder.parent / 'short.safetensors'}",
    )
    messages = [{"role": "user", "content": "Hello."}]
    assert code == 0, told
    for name in ("tall", "short"):
        visible = expected(messages, name).encode("unicode_escape").decode().replace("\\n", "\n")
        assert visible.replace("\\\\", "\\") in out
    for options, sentence in (
        (["--adapter", file, "--adapter", file], "two adapters have the name 'tall'"),
        (["--adapter", "x="], "must be FILE or NAME=FILE"),
        (["--adapter", "/nowhere/x"], "/nowhere/x"),
        (["--seed", -1], "seed must lie in"),
        (["--input", "x"], "--input belongs to"),
    ):
        code, out, told = program(capsys, monkeypatch, "", *asked, *options)
        assert code == 2 and sentence in told and told.count("\n") == 1, told
    code, _, told = program(
        capsys, monkeypatch, "", "--base", base_folder, "--prompt", "x", "--adapter", file, "--adapter", file
    )
    assert code == 2 and "--adapter is given twice" in told
