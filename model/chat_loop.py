"""A conversation in the terminal: what was said before counts, and answers appear as they are written.

Each line is a message. Lines that begin with a slash are commands: /reset forgets the conversation, /adapter NAME goes
on with another adapter, /quit ends. Ctrl-C ends the present answer, Ctrl-D the conversation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from zinit_kernels.console import printable, shown

from .chat import encode_chat
from .errors import UserError
from .llama import Adapter, Llama
from .serving.engine import Engine
from .serving.request import Event, Finished, NewToken, Sampling
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
        """Answers a message, writing the answer as it comes. Raises UserError if it cannot be answered."""
        messages = [*self.messages, {"role": "user", "content": message}]
        engine, adapter = self.answerers[self.name]
        room = engine.room - min(self.sampling.max_new_tokens, engine.room // 2)
        prompt = encode_chat(self.tokenizer, messages, engine.room + 1)
        while len(prompt) > room and len(messages) > 1:  # the oldest message and its answer are forgotten
            messages = messages[2:]
            prompt = encode_chat(self.tokenizer, messages, engine.room + 1)
        if len(prompt) >= engine.room:
            raise UserError(f"the message is longer than the model's context of {engine.room} tokens.")
        if len(messages) < len(self.messages) + 1:
            self.write("(the conversation is longer than the model's context: its beginning is forgotten)\n")
        most = min(self.sampling.max_new_tokens, engine.room - len(prompt))
        sampling = replace(self.sampling, max_new_tokens=most)
        text = self._answer(engine, adapter, prompt, sampling)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text

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

    def _answer(self, engine: Engine, adapter: str | None, prompt: list[int], sampling: Sampling) -> str:
        answer = AnswerText(self.tokenizer.decode, self.stops)
        pieces: list[str] = []
        ends: list[Finished] = []

        def tell(event: Event) -> None:
            if isinstance(event, NewToken):
                answer.add(event.token)
                pieces.append(answer.take())
            else:
                ends.append(event)
                pieces.append(answer.finish())
            self.write(_shown(pieces[-1]))

        request = engine.submit(
            prompt, adapter, sampling, tell=tell, stops=lambda choice, tokens: answer.stopped
        )
        try:
            while engine.step():
                pass
        except KeyboardInterrupt:
            request.cancel()
            engine.step()
        self.write("\n")
        if ends and ends[0].error is not None:
            raise ends[0].error
        return "".join(pieces)


def run(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Reads lines until /quit, the end of the input, or Ctrl-C where no answer is being written."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        conversation.write(f"({HELP.format(names=printable(', '.join(conversation.answerers)))})\n")
    while True:
        try:
            line = read("> " if is_terminal else "")
        except EOFError:
            return
        if line.startswith("/"):
            if not conversation.command(line.strip()):
                return
        elif line.strip():
            try:
                conversation.say(line)
            except UserError as error:
                conversation.write(f"({error})\n")


def _engine(model: Llama) -> Engine:
    """An engine for one conversation."""
    return Engine(model, cache_tokens=2 * model.config.max_seq_len, max_running=1, chunk=_CHUNK)


def _shown(text: str) -> str:
    """An answer's text for the terminal, which escape sequences in it could command; its lines stay lines."""
    return "\n".join(printable(line) for line in text.split("\n"))
