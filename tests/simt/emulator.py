"""The CUDA kernels and their launchers on host memory: calls the library that compile_host.py makes.

What this cannot show: speed, and what nvcc makes of the source.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from zinit_kernels.call import AnyCall, CacheCall, Call, PromptCall

MULTIPROCESSORS = 4  # of the imagined chip


class View(ctypes.Structure):
    """csrc/params.h, field by field, as the classes below; the library confirms the sizes of the last ones."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "token")),
        ("dtype", ctypes.c_int32),
        ("given", ctypes.c_bool),
    ]


class Array(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("given", ctypes.c_bool)]


class Rotary(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("stride", "positions", "dim")),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_bool) for name in ("interleaved", "by_token", "given")),
    ]


def _fields(**groups: str) -> list[tuple[str, type]]:
    kinds = {
        "i": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float, "b": ctypes.c_bool, "v": View, "a": Array,
        "r": Rotary,
    }  # fmt: skip
    return [(name, kinds[key[0]]) for key, names in groups.items() for name in names.split()]


_ATTENTION_FIELDS = _fields(
    i1="num_sequences num_heads_q num_heads_kv head_dim seqlen_q seqlen_k",
    a1="cu_seqlens_q cu_seqlens_k key_bias",
    i2="window_left window_right",
    f1="scale softcap",
    v1="prompt_key prompt_value",
    i3="prompt_length prompt_rows",
    a2="prompt_index",
    p1="gate",
    i4="gate_rows",
    b1="tanh_gate",
    a3="sinks",
)


class PromptParams(ctypes.Structure):
    _fields_ = [*_ATTENTION_FIELDS, *_fields(v1="query out", i1="total_q")]


class DecodeParams(ctypes.Structure):
    _fields_ = [
        *_ATTENTION_FIELDS,
        *_fields(
            v2="query key_cache value_cache new_key new_value",
            i5="seqlen_new",
            a4="cache_seqlens cache_leftpad block_table",
            i6="block_table_stride page_size num_pages",
            r1="rotary",
            i7="num_splits",
            v3="out",
            p2="lse",
        ),
    ]


class PrefillParams(DecodeParams):
    _fields_ = _fields(i10="total_q total_k")


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _view(tensor: Tensor | None, head_major: bool = False) -> View:
    if tensor is None:
        return View()
    assert tensor.stride(3) == 1 or tensor.numel() == 0
    batch, token, head, _ = tensor.transpose(1, 2).stride() if head_major else tensor.stride()
    return View(tensor.data_ptr(), batch, head, token, _DTYPES[tensor.dtype], True)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _array(tensor: Tensor | None) -> Array:
    return Array(_pointer(tensor), tensor is not None)


def _rotary(call: CacheCall) -> Rotary:
    by_token = call.window_left >= 0 or call.window_right >= 0
    cos = call.rotary_cos
    if cos is None:
        return Rotary(by_token=by_token)
    return Rotary(
        _pointer(cos), _pointer(call.rotary_sin), cos.shape[1], cos.shape[0], 2 * cos.shape[1], _DTYPES[cos.dtype],
        call.rotary_interleaved, by_token, True,
    )  # fmt: skip


def _prompt_fields(call: AnyCall, head_major: bool) -> dict:
    prompted, tokens = call.prompt_key is not None, 2 if head_major else 1
    return dict(
        prompt_key=_view(call.prompt_key, head_major), prompt_value=_view(call.prompt_value, head_major),
        prompt_length=call.prompt_key.shape[tokens] if prompted else 0,
        prompt_rows=call.prompt_key.shape[0] if prompted else 0, prompt_index=_array(call.prompt_index),
        gate=_pointer(call.gate), gate_rows=call.gate.shape[0] if prompted and call.gate.dim() == 2 else 1,
        tanh_gate=call.tanh_gate,
    )  # fmt: skip


def decode_params(call: CacheCall) -> tuple[DecodeParams, Tensor, Tensor]:
    """The parameters of a call, and the out and lse that they point to, full of NaN."""
    batch, seqlen_q, heads_q, head_dim = call.query.shape
    out = torch.full_like(call.query, float("nan"), memory_format=torch.contiguous_format)
    lse = torch.full((batch, heads_q, seqlen_q), float("nan"))
    page_size, paged = call.key_cache.shape[1], call.block_table is not None
    pages_each = call.block_table.shape[1] if paged else 1
    params = DecodeParams(
        **_prompt_fields(call, False), sinks=_array(call.sinks),
        num_sequences=batch, num_heads_q=heads_q, num_heads_kv=call.key_cache.shape[2], head_dim=head_dim,
        seqlen_q=seqlen_q, seqlen_k=page_size * pages_each, window_left=call.window_left,
        window_right=call.window_right, scale=call.scale, softcap=call.softcap,
        query=_view(call.query), key_cache=_view(call.key_cache), value_cache=_view(call.value_cache),
        new_key=_view(call.new_key), new_value=_view(call.new_value),
        seqlen_new=0 if call.new_key is None else call.new_key.shape[1],
        cache_seqlens=_array(call.cache_seqlens), cache_leftpad=_array(call.cache_leftpad),
        block_table=_array(call.block_table),
        block_table_stride=pages_each if paged else 0, page_size=page_size if paged else 0,
        num_pages=call.key_cache.shape[0] if paged else 0, rotary=_rotary(call), num_splits=call.num_splits,
        out=_view(out), lse=_pointer(lse),
    )  # fmt: skip
    return params, out, lse


def _attention_fields(call: Call) -> dict:
    return dict(
        **_prompt_fields(call, True), sinks=_array(call.sinks),
        num_sequences=call.batch_size, num_heads_q=call.query.shape[1], num_heads_kv=call.key.shape[1],
        head_dim=call.query.shape[3], seqlen_q=call.max_seqlen_q, seqlen_k=call.max_seqlen_k,
        cu_seqlens_q=_array(call.cu_seqlens_q), cu_seqlens_k=_array(call.cu_seqlens_k),
        key_bias=_array(call.key_bias), window_left=call.window_left, window_right=call.window_right,
        scale=call.scale, softcap=call.softcap,
    )  # fmt: skip


def prefill_params(call: Call) -> tuple[PrefillParams, Tensor, Tensor]:
    """The parameters of a call of whole sequences, and the out and lse that they point to, full of NaN."""
    batch, heads_q, total_q, head_dim = call.query.shape
    out = torch.full((batch, total_q, heads_q, head_dim), float("nan"), dtype=call.query.dtype).transpose(
        1, 2
    )
    lse = torch.full((batch, heads_q, total_q), float("nan"))
    params = PrefillParams(
        **_attention_fields(call), query=_view(call.query, True), key_cache=_view(call.key, True),
        value_cache=_view(call.value, True), out=_view(out, True), lse=_pointer(lse), total_q=total_q,
        total_k=call.key.shape[2],
    )  # fmt: skip
    return params, out, lse


def prompt_params(*arguments):
    """The parameters of `prompt_attention_`, from the operator's arguments."""
    call = PromptCall(*arguments)
    attention = call.attention()._replace(cu_seqlens_k=None)
    views = {"query": _view(call.query, True), "out": _view(call.out, True)}
    return PromptParams(**_attention_fields(attention), **views, total_q=call.query.shape[2])


def as_prefill(params: DecodeParams) -> PrefillParams:
    """prefill_params() of csrc/cuda/prefill/prefill.h."""
    fields = {name: getattr(params, name) for name, _ in DecodeParams._fields_}
    return PrefillParams(**fields, total_q=params.seqlen_q, total_k=params.seqlen_k)


class Emulator:
    """The library that `build` made."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.simt_error.restype = ctypes.c_char_p
        assert self.library.simt_sizeof_decode_params() == ctypes.sizeof(DecodeParams)
        assert self.library.simt_sizeof_prefill_params() == ctypes.sizeof(PrefillParams)
        assert self.library.simt_sizeof_prompt_params() == ctypes.sizeof(PromptParams)

    def _checked(self, code: int) -> None:
        if code:
            raise RuntimeError(self.library.simt_error().decode())

    def selftest(self, name: str) -> None:
        self._checked(self.library.simt_selftest(name.encode()))

    def shared_bytes(
        self, rows: int, head_dim: int, element_bytes: int, prompt_length: int, new_tokens: int
    ) -> int:
        return self.library.simt_shared_bytes(rows, head_dim, element_bytes, prompt_length, new_tokens)

    def plan(self, params: DecodeParams, workspace: Tensor) -> tuple[bytes, list[int]]:
        """The kernels' argument, and rows per block, row blocks, splits, tensor cores, shared bytes of both kernels."""
        work = ctypes.create_string_buffer(self.library.simt_sizeof_decode_work())
        numbers = (ctypes.c_int64 * 6)()
        self.library.simt_plan(
            ctypes.byref(params), MULTIPROCESSORS, ctypes.c_void_p(workspace.data_ptr()), work, numbers
        )
        return work.raw, list(numbers)

    def decode(self, *canonical) -> tuple[Tensor, Tensor]:
        """zinit::decode_cuda on host memory."""
        params, out, lse = decode_params(CacheCall(*canonical))
        self._checked(self.library.simt_decode(ctypes.byref(params), MULTIPROCESSORS))
        return out, lse

    def forward(self, *canonical) -> tuple[Tensor, Tensor]:
        """zinit::forward_cuda on host memory."""
        params, out, lse = prefill_params(Call(*canonical))
        self._checked(self.library.simt_prefill(ctypes.byref(params)))
        return out, lse

    def prefill_plan(self, params: PrefillParams) -> tuple[bytes, list[int]]:
        """The kernels' argument, and blocks of queries, blocks of new tokens, shared bytes; for head_dim 64."""
        work = ctypes.create_string_buffer(self.library.simt_sizeof_prefill_work())
        numbers = (ctypes.c_int64 * 3)()
        self.library.simt_prefill_plan(ctypes.byref(params), work, numbers)
        return work.raw, list(numbers)

    def prompt_plan(self, params: PromptParams) -> tuple[bytes, list[int]]:
        """The kernel's argument, and blocks of queries, shared bytes; for head_dim 64."""
        work = ctypes.create_string_buffer(self.library.simt_sizeof_prompt_work())
        numbers = (ctypes.c_int64 * 2)()
        self.library.simt_prompt_plan(ctypes.byref(params), work, numbers)
        return work.raw, list(numbers)

    def add_prompt_branch(self, *arguments) -> None:
        """zinit::prompt_cuda on host memory."""
        self._checked(self.library.simt_prompt(ctypes.byref(prompt_params(*arguments))))

    def tile_bytes(self, head_dim: int) -> tuple[int, int]:
        """Shared memory of a prefill block, and of one that adds the prompt branch alone."""
        numbers = (ctypes.c_int64 * 2)()
        self.library.simt_tile_bytes(head_dim, numbers)
        return tuple(numbers)

    def bank_conflicts(self) -> int:
        """Of the matrices loaded from shared memory since the last question."""
        return self.library.simt_bank_conflicts()
