"""A conversation in the terminal: what was said before counts, and answers appear as they are written.

Each line is a message. Lines that begin with a slash are commands: /reset forgets the conversation, /adapter NAME goes
on with another adapter, /quit ends. Ctrl-C ends the present answer, and twice at the prompt the conversation, as Ctrl-D
does.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Event
from typing import NamedTuple

from zinit_kernels.console import for_output, printable, shown

from .chat import encode_chat
from .errors import UserError
from .llama import Adapter, Llama
from .program import interruptible
from .serving.engine import DEFAULT_CACHE_BYTES, Engine, bytes_a_token
from .serving.pages import PAGE_SIZE
from .serving.request import Event as Told
from .serving.request import Finished, NewToken, Sampling
from .serving.text import AnswerText
from .tokenizer import Tokenizer

BASE = "base"  # the name of the base alone
HELP = "/reset forgets the conversation, /adapter NAME takes another adapter (there are: {names}), /quit ends"
_CHUNK = 512  # tokens of a message in one pass


class Answerer(NamedTuple):
    """What answers: an engine, and the adapter's name there."""

    engine: Engine
    adapter: str | None


class Conversation:
    """What was said so far, and who answers. The engine keeps the pages of it, so that only what is new is computed."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        adapters: Mapping[str, tuple[Llama, Adapter]],
        sampling: Sampling,
        stops: Sequence[str] = (),
        write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    ):
        self.tokenizer, self.sampling, self.stops, self.write = tokenizer, sampling, stops, write
        self.messages: list[dict[str, str]] = []
        engines = {id(model): _engine(model)}
        self.answerers = {BASE: Answerer(engines[id(model)], None)}
        for name, (own, adapter) in adapters.items():
            if name in self.answerers:
                raise UserError(f"two adapters have the name {shown(name)}: give each one by NAME=FILE.")
            if id(own) not in engines:  # a published V2 has a base of its own
                engines[id(own)] = _engine(own)
            engine = engines[id(own)]
            engine.add_adapter(name, adapter)
            self.answerers[name] = Answerer(engine, name)
        self.name = next(iter(adapters), BASE)

    def say(self, message: str) -> str:
        """Answers a message, writing the answer as it comes. Raises UserError if it cannot be answered.

        The first Ctrl-C ends the answer; what was written of it counts as said.
        """
        _check_encoding(message)
        # An exception in the middle of a step would leave the engine's pages and sequences half changed.
        with interruptible(signal.SIGINT) as interrupted:
            engine, adapter = self.answerers[self.name]
            messages, prompt = self._prompt(message, engine.room)
            most = min(self.sampling.max_new_tokens, engine.room - len(prompt))
            sampling = replace(self.sampling, max_new_tokens=most)
            text = self._answer(engine, adapter, prompt, sampling, interrupted)
            if text or not interrupted.is_set():
                self.messages = [*messages, {"role": "assistant", "content": text}]
        return text

    def _prompt(self, message: str, most: int) -> tuple[list[dict[str, str]], list[int]]:
        """The conversation with this message, and its tokens: less than `most`."""
        messages = [*self.messages, {"role": "user", "content": message}]
        room = most - min(self.sampling.max_new_tokens, most // 2)
        prompt = encode_chat(self.tokenizer, messages, most + 1)
        while len(prompt) > room and len(messages) > 1:  # the oldest message and its answer are forgotten
            messages = messages[2:]
            prompt = encode_chat(self.tokenizer, messages, most + 1)
        if len(prompt) >= most:
            raise UserError(f"the message is longer than the model's context of {most} tokens.")
        if len(messages) < len(self.messages) + 1:
            self.write("(the conversation is longer than the model's context: its beginning is forgotten)\n")
        return messages, prompt

    def command(self, line: str) -> bool:
        """Does what a line with a slash says; False ends the conversation."""
        word, _, rest = line.partition(" ")
        name, names = rest.strip(), ", ".join(self.answerers)
        if word == "/quit":
            return False
        if word == "/reset":
            self.messages = []
            self.write("(the conversation is forgotten)\n")
        elif word == "/adapter" and name in self.answerers:
            self.name = name
            self.write(f"({printable(name)} answers)\n")
        elif word == "/adapter":
            what = f"there is no adapter {shown(name)}" if name else f"{printable(self.name)} answers"
            self.write(f"({what}; there are: {printable(names)})\n")
        else:
            self.write(f"({HELP.format(names=printable(names))})\n")
        return True

    def _answer(
        self, engine: Engine, adapter: str | None, prompt: list[int], sampling: Sampling, interrupted: Event
    ) -> str:
        answer = AnswerText(self.tokenizer.decode, self.stops)
        pieces: list[str] = []
        ends: list[Finished] = []
        written = 0

        def tell(event: Told) -> None:
            if isinstance(event, NewToken):
                answer.add(event.token)
                pieces.append(answer.take())
            else:
                ends.append(event)
                pieces.append(answer.finish())

        request = engine.submit(
            prompt, adapter, sampling, tell=tell, stops=lambda choice, tokens: answer.stopped
        )
        while not ends:
            if interrupted.is_set():
                request.cancel()
            engine.step()
            self.write(
                for_output("".join(pieces[written:]))
            )  # not in `tell`: a closed pipe is no engine's fault
            written = len(pieces)
        self.write("\n")
        if ends[0].error is not None:
            raise ends[0].error
        return "".join(pieces)


def run(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Reads lines until /quit, the end of the input, or Ctrl-C twice at the prompt.

    One Ctrl-C at the prompt may have been meant for the answer that has just ended: it forgets the line alone.
    """
    is_terminal = sys.stdin.isatty()
    _prepare_input(is_terminal)
    if is_terminal:
        conversation.write(f"({HELP.format(names=printable(', '.join(conversation.answerers)))})\n")
    stopped = False  # by Ctrl-C at the last prompt
    while True:
        try:
            line = read("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                conversation.write("\n")
            return
        except KeyboardInterrupt:
            if stopped or not is_terminal:
                raise
            stopped = True
            conversation.write("\n(Ctrl-C again, Ctrl-D or /quit ends the conversation)\n")
            continue
        stopped = False
        if line.startswith("/"):
            if not conversation.command(line.strip()):
                return
        elif line.strip():
            try:
                conversation.say(line)
            except UserError as error:
                conversation.write(f"({error})\n")


def _prepare_input(is_terminal: bool) -> None:
    """Lets `input` edit long lines at a terminal, and survive bytes that are no text."""
    if is_terminal:
        with suppress(ImportError):  # a terminal itself cuts lines at 4,095 bytes, and has no arrow keys
            import readline  # noqa: F401
    with suppress(AttributeError):  # a stand-in for stdin has no such method
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]


def _check_encoding(message: str) -> None:
    """Raises UserError for a message with bytes that are no characters."""
    try:
        message.encode()
    except UnicodeEncodeError as error:
        code = ord(message[error.start])
        what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else "half a character"
        encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
        raise UserError(
            f"the message is no text in {encoding}: character {error.start + 1} is {what}."
        ) from None


def _engine(model: Llama) -> Engine:
    """An engine for one conversation: for two whole contexts, or what fits into 2 GiB. Of models that were trained on
    100,000 tokens, the cache of a whole context is larger than their weights.
    """
    tokens = max(min(2 * model.config.max_seq_len, DEFAULT_CACHE_BYTES // bytes_a_token(model)), PAGE_SIZE)
    return Engine(model, cache_tokens=tokens, max_running=1, chunk=_CHUNK)
