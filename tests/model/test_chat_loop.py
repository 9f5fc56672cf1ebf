"""The conversation in the terminal: every answer is generate()'s for what was said so far."""

import io
import json
import logging
import os
import pty
import signal
import sys
from dataclasses import replace

import pytest
from tiny_runs import make_base, write_tokenizer
from tiny_serving import ADAPTERS, TEMPLATE, make_adapters

from model import chat_loop
from model.adapter_files import save_adapter
from model.chat import encode_chat
from model.chat_loop import Conversation, run
from model.errors import UserError, run_program
from model.generate import _named, main
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
    """Wherever it comes: here, the engine has taken a page and no sequence holds it yet."""
    written = []
    talk, _ = start(base_folder, written)
    engine = talk.answerers["tall"].engine
    take, taken = engine.pool.take, []

    def interrupted():
        taken.append(take())
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(engine.pool, "take", interrupted)
    said = talk.say("Hello, and tell me of it.")
    assert 0 < len(said) < 20 and engine.pool.available == engine.pool.num_pages
    lines = iter(["Hello.", "", "/quit", "never"])
    run(talk, lambda prompt: next(lines))
    assert next(lines) == "never" and len(talk.messages) == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_before_the_answer_is_as_if_nothing_was_said(base_folder, monkeypatch):
    talk, _ = start(base_folder, [])

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return encode_chat(*arguments)

    monkeypatch.setattr(chat_loop, "encode_chat", interrupted)
    assert talk.say("Hello.") == "" and talk.messages == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_an_interrupt_at_the_prompt_forgets_the_line_and_the_second_ends(base_folder, monkeypatch):
    """The first one may have been meant for an answer that had just ended."""
    written = []
    talk, _ = start(base_folder, written)
    monkeypatch.setattr(sys, "stdin", Terminal())
    given = iter([KeyboardInterrupt, "/reset", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def read(prompt):
        line = next(given)
        if isinstance(line, str):
            return line
        raise line

    with pytest.raises(KeyboardInterrupt):
        run(talk, read)
    assert next(given) == "never" and "Ctrl-C again, Ctrl-D or /quit" in "".join(written)


@pytest.mark.parametrize("where", [io.StringIO, Terminal])
def test_answers_are_shown_as_they_are(base_folder, monkeypatch, where):
    """Joined emoji and wide spaces are text; only what a terminal would obey is shown as an escape there."""
    written = []
    talk, _ = start(base_folder, written)
    talk.tokenizer = replace(talk.tokenizer, _decode=lambda ids: "\u3000\u200d\t\xa0\x1b" * len(ids))
    monkeypatch.setattr(sys, "stdout", where())
    said = talk.say("Hello.")
    shown = said.replace("\x1b", "\\x1b") if where is Terminal else said
    assert "\x1b" in said and "".join(written) == shown + "\n"


def test_a_reader_that_has_gone_is_no_fault_of_the_engine(base_folder, caplog):
    talk, _ = start(base_folder, [])

    def write(text):
        raise BrokenPipeError

    talk.write = write
    with caplog.at_level(logging.INFO), pytest.raises(BrokenPipeError):
        talk.say("Hello.")
    assert not caplog.records


def test_the_cache_of_a_long_context_is_bounded(base_folder, monkeypatch):
    """Two contexts of 131,072 tokens of an 8B model take 34 GB."""
    monkeypatch.setattr(chat_loop, "DEFAULT_CACHE_BYTES", 128 * 4 * 2 * 2 * 8 * 4)  # 128 tokens
    talk, _ = start(base_folder, [])
    for _ in range(4):
        talk.say("x" * 30)
    assert talk.answerers["tall"].engine.pool.num_pages == 8
    with pytest.raises(UserError, match="128 tokens"):
        talk.say("x" * 130)


def test_a_terminal_takes_long_lines(monkeypatch):
    """A terminal that edits lines itself cuts them at 4,095 bytes."""
    ours, theirs = pty.openpty()
    line = b"/" + b"x" * 6000 + "ä".encode() + b"\xff"

    class Listener:
        answerers, lines = (), []

        def write(self, text):
            os.write(1, text.encode())

        def command(self, line):
            self.lines.append(line)
            return False

    def child():
        os.setsid()
        for number in (0, 1):
            os.dup2(theirs, number)
        os.close(ours)
        sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
        run(Listener())
        os._exit(0 if Listener.lines == [line.decode(errors="surrogateescape")] else 1)

    child_id = os.fork()
    if child_id == 0:
        signal.alarm(20)
        try:
            child()
        finally:
            os._exit(2)
    os.close(theirs)
    shown = b""
    while b"> " not in shown:
        shown += os.read(ours, 4096)
    rest = line + b"\n"
    while rest:
        rest = rest[os.write(ours, rest[:512]) :]
        os.read(ours, 65536)
    ended, status = os.waitpid(child_id, 0)
    os.close(ours)
    assert os.waitstatus_to_exitcode(status) == 0


def program(capsys, monkeypatch, text, *options):
    stdin = io.StringIO(text) if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", stdin)
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
        assert expected(messages, name) in out
    for options, sentence in (
        (["--adapter", file, "--adapter", file], "two adapters have the name 'tall'"),
        (["--adapter", "x="], "must be FILE or NAME=FILE"),
        (["--adapter", "/nowhere/x"], "/nowhere/x"),
        (["--seed", -1], "seed must lie in"),
        (["--input", "x"], "--input belongs to"),
        (["--image", "x"], "--image belongs to"),
    ):
        code, out, told = program(capsys, monkeypatch, "", *asked, *options)
        assert code == 2 and sentence in told and told.count("\n") == 1, told
    code, _, told = program(
        capsys, monkeypatch, "", "--base", base_folder, "--prompt", "x", "--adapter", file, "--adapter", file
    )
    assert code == 2 and "--adapter is given twice" in told


def test_bytes_that_are_no_text_cost_one_line(base_folder, capsys, monkeypatch):
    """Python's own error for them would end the conversation, and lose the lines that it had read with them."""
    options = ["--base", base_folder, "--chat", "--temperature", 0, "--max-new-tokens", 20, "--device", "cpu"]
    stdin = io.TextIOWrapper(io.BytesIO(b"Hel\xfflo.\nHello.\n"), encoding="utf-8")
    code, out, told = program(capsys, monkeypatch, stdin, *options)
    _, expected = start(base_folder, [])
    assert code == 0 and "(the message is no text in utf-8: character 4 is the byte 0xff.)\n" in out, told
    assert out.endswith(expected([{"role": "user", "content": "Hello."}], "base") + "\n")


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_closed_stream_is_told(base_folder, capsys, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: main(["--base", str(base_folder), "--chat"]))
    assert (
        ended.value.code == 2 and capsys.readouterr().err == f"error: --chat needs {name}, which is closed.\n"
    )


def test_a_folder_has_its_whole_name(tmp_path):
    (tmp_path / "v1.5").mkdir()
    assert _named(tmp_path / "v1.5")[0] == "v1.5" and _named(tmp_path / "poems.pt")[0] == "poems"
