"""Answers one prompt, streaming the answer, or a file of prompts.

python -m model.generate --base DIR --adapter FILE --instruction "Name three primary colours."
python -m model.generate --base DIR --prompts-file prompts.txt --batch-size 16
python -m model.generate --base DIR --adapter FILE --encoder DIR --image cat.jpg --instruction "What is it?"
python -m model.generate --base model.Q4_K_M.gguf --message "Name three primary colours."
python -m model.generate --base DIR --adapter poems=FILE --adapter prose=FILE --chat
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from zinit_kernels.console import Parser, for_output

from .chat import encode_chat
from .chat_loop import Conversation
from .chat_loop import run as run_conversation
from .errors import UserError, program_name, run_program
from .huge_pages import use_huge_pages
from .llama import Adapter, Llama, about_images
from .loading import DTYPES, default_device, load_base, open_device
from .program import program
from .progress import messages, progress
from .quantised import add_option as add_quantise_option
from .records import check_text, format_prompt, read_prompts
from .sampling import NUM_SEEDS, check_request, generate
from .serving.request import Sampling
from .serving.text import AnswerText
from .stop_strings import cut
from .tokenizer import Tokenizer, load_tokenizer
from .vision.adapter import VisualAdapter
from .vision.files import open_adapter
from .vision.options import add_encoder_options, check_options, open_source
from .vision.records import read_image_prompts


class Watcher:
    """Sees the tokens of the answers: ends an answer at a stop string, streams its text, and counts the tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stream: bool):
        self.tokenizer, self.stop, self.stream = tokenizer, stop, stream
        self.answers: dict[int, AnswerText] = {}
        self.count = 0

    def __call__(self, index: int, tokens: list[int]) -> bool:
        self.count += 1
        if not self.stream and not self.stop:
            return False
        if len(tokens) == 1:  # of the first batch, or of the next
            self.answers[index] = AnswerText(self.tokenizer.decode, self.stop)
        answer = self.answers[index]
        answer.add(tokens[-1])
        if self.stream:
            self._print(answer.take())
        return answer.stopped

    def finish(self) -> None:
        """Prints what of the one streamed answer waited for the next tokens: the beginning of a character or of a stop
        string.
        """
        if 0 in self.answers:
            self._print(self.answers[0].finish())

    def _print(self, text: str) -> None:
        print(for_output(text), end="", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program_name("generate"), description="Generate with a LLaMA and an adapter.")
    parser.add_argument(
        "--base", type=Path, required=True, help="checkpoint folder, Hugging Face's or Meta's, or a GGUF file"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an adapter's file, or a folder that holds one, such as a run's; without it the base alone answers. With "
        "--chat it may be repeated, as NAME=FILE",
    )
    parser.add_argument(
        "--prompt-length", type=int, help="of an official-v1 adapter, whose file does not say (default: 10)"
    )
    parser.add_argument(
        "--gate-activation",
        choices=("tanh", "identity"),
        help="of the adapter's gates (default: as its file says)",
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="text to go on from, as it is")
    asked.add_argument("--instruction", help="an instruction, put into the Alpaca template")
    asked.add_argument("--message", help="a message, put into the model's own chat template")
    asked.add_argument(
        "--chat",
        action="store_true",
        help="a conversation in the terminal, by the model's own chat template: /reset, /adapter NAME, /quit",
    )
    asked.add_argument(
        "--prompts-file", type=Path, help="one prompt a line; answers come as one JSON object a line"
    )
    parser.add_argument("--input", default="", help="the input that belongs to --instruction")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an image that the prompt is about, or every prompt of the file; may be repeated. With --encoder a file "
        'of JSON may name images of its own: {"image": FILE, "instruction": ...}',
    )
    add_encoder_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--temperature", type=float, default=0.1, help="0 = greedy (default: 0.1)")
    parser.add_argument("--top-p", type=float, default=0.75, help="default: 0.75")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--stop", action="append", default=[], help="end an answer at this text; may be repeated"
    )
    parser.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="read up to N tokens at once that followed the last ones "
        "before; the answer stays the same (one prompt at a time; default: off)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="prompts decoded at once (default: 16)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    add_quantise_option(parser)
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")
    parser.add_argument("--backend", default="auto", help="of the attention kernels (default: auto)")
    return parser


def _asked(arguments: argparse.Namespace) -> tuple[list[str], list[tuple[str, ...]]]:
    """The prompts asked for, by whichever option, and the images that each is about."""
    if arguments.input and arguments.instruction is None:
        raise UserError("--input belongs to --instruction, which was not given.")
    for name in ("prompt", "instruction", "input", "message"):
        if getattr(arguments, name) is not None:
            check_text(getattr(arguments, name), name, "the command line")
    images = tuple(map(str, arguments.image))
    if arguments.prompts_file is not None and arguments.encoder is not None:
        texts, own = read_image_prompts(arguments.prompts_file, arguments.images)
        if images and any(own):
            raise UserError(f"{arguments.prompts_file} names images itself: leave out --image.")
        return texts, [images or of_prompt for of_prompt in own]
    if arguments.prompts_file is not None:
        texts = read_prompts(arguments.prompts_file)
    elif arguments.instruction is not None:
        texts = [format_prompt(arguments.instruction, arguments.input)]
    else:
        texts = [arguments.message if arguments.prompt is None else arguments.prompt]
    return texts, [images] * len(texts)


def _load_base(arguments: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    device = open_device(arguments.device)
    model = load_base(arguments.base, DTYPES.get(arguments.dtype), device, arguments.quantise).freeze()
    model.set_backend(arguments.backend)
    use_huge_pages(model)
    return model, load_tokenizer(arguments.base).check_vocabulary(model.config.vocab_size)


def _load(arguments: argparse.Namespace) -> tuple[Llama, Tokenizer, Adapter | None]:
    """The base, its tokenizer, and the adapter if one was named, with the encoder of its images."""
    model, tokenizer = _load_base(arguments)
    if not arguments.adapter:
        return model, tokenizer, None
    (path,) = arguments.adapter
    model, adapter = open_adapter(path, model, arguments.prompt_length, arguments.gate_activation)
    if arguments.encoder is not None:
        if not isinstance(adapter, VisualAdapter):
            raise UserError(f"{path} has no visual part: --encoder and --image are of no use to it.")
        adapter.source = open_source(arguments, adapter, model.device)
    return model, tokenizer, adapter.to(model.device)


def _chat(arguments: argparse.Namespace) -> None:
    """The conversation of --chat."""
    names = [_named(path) for path in arguments.adapter]
    model, tokenizer = _load_base(arguments)
    sampling = Sampling(
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_p,
        arguments.seed,
        eos_ids=tuple({*model.config.eos_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])}),
    )
    sampling.check()
    encode_chat(
        tokenizer, [{"role": "user", "content": "Hello."}]
    )  # a base without a template is refused now
    _try_backend(arguments.backend, model, None, [0], ())
    adapters: dict[str, tuple[Llama, Adapter]] = {}
    for name, path in names:
        if name in adapters:
            raise UserError(f"two adapters have the name {name!r}: give each one by --adapter NAME=FILE.")
        own, adapter = open_adapter(path, model, arguments.prompt_length, arguments.gate_activation)
        adapters[name] = own, adapter.requires_grad_(False).to(own.device)
    run_conversation(Conversation(model, tokenizer, adapters, sampling, arguments.stop))


def _named(path: Path) -> tuple[str, Path]:
    """NAME=FILE, or FILE, whose name is the adapter's."""
    name, equals, file = str(path).partition("=")
    if not equals or path.exists():
        return (path.name if path.is_dir() else path.stem) or str(path), path
    if not name or not file:
        raise UserError(f"--adapter must be FILE or NAME=FILE, got {str(path)!r}.")
    return name, Path(file)


def _encode(texts: Sequence[str], tokenizer: Tokenizer, context: int, chat: bool) -> list[list[int]]:
    """The prompts in tokens: what the tokenizer puts before a text, and no end of sequence behind it.

    chat: each text is a message for the chat template.
    """
    prompts = []
    for index, text in enumerate(texts):
        if chat:
            prompts.append(encode_chat(tokenizer, [{"role": "user", "content": text}], context + 1))
        else:
            prompts.append(tokenizer.encode(text, eos=False, limit=context + 1))
        if len(prompts[-1]) > context:
            raise UserError(f"prompt {index} is longer than the model's context of {context} tokens.")
    return prompts


def _try_backend(
    backend: str, model: Llama, adapter: Adapter | None, prompt: list[int], images: tuple[str, ...]
) -> None:
    """A token of a prompt and one after it, so that a backend that cannot run is refused before the first answer."""
    if backend == "auto":
        return
    try:
        generate(
            model, [prompt], about_images(adapter, [images]), max_new_tokens=2, temperature=0, eos_ids=()
        )
    except ValueError as error:
        raise UserError(f"--backend {backend}: {error}.") from error


@program("lower --batch-size or --max-new-tokens, or take --dtype bfloat16")
def main(command_line: list[str] | None = None) -> None:
    """The program. Everything is read and checked before the first token."""
    arguments = _parser().parse_args(command_line)
    _check_options(arguments)
    if arguments.chat:
        _chat(arguments)
        return
    texts, images = _asked(arguments)
    model, tokenizer, adapter = _load(arguments)
    prompts = _encode(texts, tokenizer, model.config.max_seq_len, arguments.message is not None)
    sampling = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p")}
    check_request(model, prompts, **sampling, seed=arguments.seed)
    if (
        isinstance(adapter, VisualAdapter) and adapter.source is not None
    ):  # a bad image is refused before any answer
        adapter.source.of([path for of_prompt in images for path in of_prompt])
    _try_backend(arguments.backend, model, adapter, prompts[0][:1], images[0])
    eos_ids = {*model.config.eos_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])}

    many = arguments.prompts_file is not None
    watcher = Watcher(tokenizer, arguments.stop, stream=not many)
    start = time.perf_counter()
    with progress(messages(), len(prompts), transient=True) if many else nullcontext() as show:
        batch_size = 1 if arguments.lookup else arguments.batch_size
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            outputs = generate(
                model,
                batch,
                about_images(adapter, images[first : first + batch_size]),
                **sampling,
                seed=(arguments.seed + first) % NUM_SEEDS,
                eos_ids=eos_ids,
                watch=watcher,
                lookup=arguments.lookup,
            )
            for text, output in zip(texts[first:], outputs, strict=False):
                _show(watcher, text, output, many)
            if show is not None:
                show(first + len(batch), "prompts")
    seconds = time.perf_counter() - start
    rate = watcher.count / seconds
    print(f"{watcher.count} tokens in {seconds:.2f} s, {rate:.1f} tokens/s", file=sys.stderr)


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {arguments.batch_size}.")
    if arguments.lookup < 0:
        raise UserError(f"--lookup must not be negative, got {arguments.lookup}.")
    if arguments.chat:
        _check_chat(arguments)
    check_options(arguments)
    if arguments.image and arguments.encoder is None:
        raise UserError(
            "--image needs --encoder, the folder of the image encoder that the adapter was trained with."
        )
    if arguments.image and arguments.images is not None:
        raise UserError(
            "--images is the folder of the images that a file names: give --image its whole path."
        )
    if arguments.encoder is not None and not arguments.adapter:
        raise UserError("--encoder belongs to --adapter, which was not given: the base alone sees no images.")
    if "" in arguments.stop:
        raise UserError("--stop must not be empty: every answer would end at once.")
    if len(arguments.adapter) > 1 and not arguments.chat:
        raise UserError("--adapter is given twice, and only one can count without --chat.")
    if not arguments.adapter:
        for option, value in (
            ("--prompt-length", arguments.prompt_length),
            ("--gate-activation", arguments.gate_activation),
        ):
            if value is not None:
                raise UserError(f"{option} belongs to --adapter, which was not given.")


def _check_chat(arguments: argparse.Namespace) -> None:
    """Refuses what a conversation has no use for."""
    for option in ("lookup", "input", "encoder", "image", "images"):
        if getattr(arguments, option):
            raise UserError(f"--{option} belongs to a single prompt: a conversation of --chat takes none.")
    for stream in ("stdin", "stdout"):
        if getattr(sys, stream) is None:
            raise UserError(f"--chat needs {stream}, which is closed.")


def _show(watcher: Watcher, prompt: str, tokens: list[int], many: bool) -> None:
    """One answer: a JSON object if there are many, else what the streaming has not shown yet."""
    if many:
        answer = cut(watcher.tokenizer.decode(tokens), watcher.stop)
        print(for_output(json.dumps({"prompt": prompt, "output": answer}, ensure_ascii=False)), flush=True)
    else:
        watcher.finish()
        print()


if __name__ == "__main__":
    run_program(main)
