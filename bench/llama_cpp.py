"""llama.cpp on this project's base: a GGUF file with the same weights, and a process of its own that generates from it.

The process has huge pages, as this project's weights do, and its threads do not wait on the processor beside torch's.
"""

from __future__ import annotations

import signal
import tempfile
import weakref
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.gguf_weights import LAYER_NAMES, NAMES
from model.llama import Llama
from zinit_kernels.packed import Packed

from .measure import malloc_settings

NEEDS = ("llama_cpp", "gguf")
# malloc asks for huge pages: llama.cpp then reads its weights 1.1 to 1.2 times as fast (AMD EPYC in a virtual machine)
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_WAIT = 600  # seconds for an answer, before the process counts as stuck


def write_gguf(base: Llama, path: Path) -> None:
    """The base as a GGUF file without a vocabulary. Packed weights become Q8_0 or Q4_0 blocks of 32, by their bits."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config = base.config
    if config.rope_scaling is not None or config.sliding_window is not None:
        raise ValueError("a base with scaled rotary embeddings or a sliding window is not written")
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads_q)
    writer.add_head_count_kv(config.num_heads_kv)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for name, module in _named_weights(base):
        packed = isinstance(module, Packed)
        weight = module.packed.unpack(torch.float32) if packed else module.weight.detach()
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = to_interleaved(weight, config.head_dim)
        if packed:
            kind = GGMLQuantizationType.Q8_0 if module.scheme.bits == 8 else GGMLQuantizationType.Q4_0
        elif weight.dim() == 2 and weight.dtype == torch.bfloat16:
            kind = GGMLQuantizationType.BF16
        else:
            kind = GGMLQuantizationType.F32
        numbers = quants.quantize(weight.float().numpy(), kind)
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named_weights(base: Llama) -> list[tuple[str, nn.Module]]:
    """Every module with a weight, by GGUF's name of the weight."""
    found = [
        (theirs, base.get_submodule(ours.removesuffix(".weight")))
        for theirs, ours in NAMES.items()
        if ours != "lm_head.weight" or base.lm_head is not None
    ]
    for number, layer in enumerate(base.layers):
        found += [
            (f"blk.{number}.{theirs}.weight", layer.get_submodule(ours))
            for theirs, ours in LAYER_NAMES.items()
        ]
    return found


def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from rotary pairs (i, i + D/2) to llama.cpp's pairs (0, 1), (2, 3), ..."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


class LlamaCpp:
    """A process that generates greedily from a base, with as many threads as torch has here.

    Raises RuntimeError with llama.cpp's reason where it cannot.
    """

    def __init__(self, base: Llama):
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "base.gguf"
        write_gguf(base, path)
        context = get_context("spawn")
        self._answers, theirs = context.Pipe()
        with malloc_settings(_HUGE_PAGES):
            process = context.Process(
                target=_serve,
                args=(theirs, str(path), base.config.vocab_size, torch.get_num_threads()),
                daemon=True,
            )
            process.start()
        theirs.close()
        weakref.finalize(self, _end, process, self._answers)

    def generate(self, prompts: Tensor, new: int) -> Tensor:
        """The likeliest `new` tokens behind each of the prompts [B, T], one after the other: [B, new]."""
        try:
            self._answers.send((prompts.tolist(), new))
            if not self._answers.poll(_WAIT):
                raise RuntimeError(f"llama.cpp has not answered for {_WAIT} s")
            answer = self._answers.recv()
        except (EOFError, OSError):
            raise RuntimeError("llama.cpp's process has ended") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return torch.tensor(answer)


def _end(process: Any, answers: Connection) -> None:
    answers.close()
    process.join(5)
    process.kill()


def _serve(requests: Connection, path: str, vocab_size: int, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    engine: _Engine | None = None
    while True:
        try:
            prompts, new = requests.recv()
        except EOFError:
            return
        try:
            if engine is None or not engine.holds(len(prompts), len(prompts[0]) + new):
                engine = None  # its memory first
                engine = _Engine(path, vocab_size, threads, len(prompts), len(prompts[0]) + new)
            requests.send(engine.generate(prompts, new))
        except Exception as error:  # any: the parent is told, and gives no figure
            requests.send(f"{type(error).__name__}: {error}")


class _Engine:
    """A model and a context for some sequences, by llama.cpp's C interface."""

    def __init__(self, path: str, vocab_size: int, threads: int, sequences: int, length: int):
        import llama_cpp

        self._c, self._vocab_size, self._sequences, self._length = llama_cpp, vocab_size, sequences, length
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        llama_cpp.llama_log_set(self._silent, None)
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 0
        model_options.use_mmap = False  # a mapped file has no huge pages
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not read {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = sequences * length
        options.n_batch = options.n_ubatch = max(512, sequences)
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        options.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._batch = llama_cpp.llama_batch_init(options.n_batch, 0, 1)
        self._room = options.n_batch
        weakref.finalize(self, _free, llama_cpp, self._batch, self._context, self._model)

    def holds(self, sequences: int, length: int) -> bool:
        return sequences == self._sequences and length <= self._length

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)
        places = [
            (row, place, token) for row, prompt in enumerate(prompts) for place, token in enumerate(prompt)
        ]
        last = len(prompts[0]) - 1
        chosen: dict[int, int] = {}
        for begin in range(0, len(places), self._room):
            chosen |= self._read(places[begin : begin + self._room], last)
        made = [[chosen[row]] for row in range(len(prompts))]
        for place in range(last + 1, last + new):
            chosen = self._read([(row, place, tokens[-1]) for row, tokens in enumerate(made)], place)
            for row, tokens in enumerate(made):
                tokens.append(chosen[row])
        return made

    def _read(self, tokens: list[tuple[int, int, int]], wanted: int) -> dict[int, int]:
        """Reads (sequence, place, token); the likeliest token behind each one at the place `wanted`, by sequence."""
        import numpy

        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (row, place, token) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.seq_id[index][0] = token, place, row
            batch.n_seq_id[index], batch.logits[index] = 1, place == wanted
        if status := self._c.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        found = {}
        for index, (row, place, _) in enumerate(tokens):
            if place == wanted:
                logits = self._c.llama_get_logits_ith(self._context, index)
                found[row] = int(numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
        return found


def _free(c: Any, batch: Any, context: Any, model: Any) -> None:
    c.llama_batch_free(batch)
    c.llama_free(context)
    c.llama_model_free(model)
