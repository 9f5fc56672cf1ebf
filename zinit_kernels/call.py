"""What an attention operator is asked to compute: one description, from which everything else is derived.

Each field of `Call`, `CacheCall` and `PromptCall` is one argument of an operator, and its annotation says what
the code has to know about it: Tensor or number, optional or not, shape, dtype, strides and role. From the fields
follow the operators' schemas and fake kernels (`operators.py`), what backward saves and returns
(`backends/fused.py`), what the fast path asks (`fast_path.py`), how launchers and FLOP formulas read their
arguments (`Call(*arguments)`), and the order in which the C++ bindings take them (test_call.py compares).
To add an argument, add its field, its check in `arguments.py`, and the kernels.

Letters: B sequences, Hq query heads, Hkv key and value heads, T queries, S keys, D head_dim, N rows of the prompt
table, P prompts.

Two layouts: `Call` is head-major, as `F.scaled_dot_product_attention` is, and `CacheCall` token-major, as
`flash_attn_with_kvcache` is. Each keeps the layout of its users because a view costs about 1 us: turning the seven
tensors of a decoding step and its output around takes 7 us of a call whose whole overhead is 11, and attention of
whole sequences would pay 6 of 11 the other way round. Kernels read through strides, so the layout costs them
nothing. `CacheCall.head_major` is the one place in Python that turns one layout into the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the fused kernels compute with
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))  # those that are what their storage says
GATE_ACTIVATIONS = ("tanh", "identity")
MAX_SCALE = 3e38  # beyond it float32, in which the kernels compute, has infinity
SOFTCAPS = (1e-30, 1e30)  # least and most, since the kernels divide by it in float32; 0.0 is none


class Role(Enum):
    """What an operator does with a tensor."""

    DIFFERENTIABLE = "read, and backward returns its gradient"
    READ = "read"
    WRITTEN = "changed in place"
    UNFUSED = "not given to operators: only the backends in plain PyTorch take it"


@dataclass(frozen=True)
class TensorSpec:
    """How an operator takes a tensor."""

    shape: str
    role: Role
    dtypes: tuple[torch.dtype, ...]  # (): the query's
    contiguous: bool  # else any strides with a contiguous last dimension

    @property
    def dims(self) -> int:
        return self.shape.count(",") + 1

    @property
    def is_table(self) -> bool:
        """Whether its rows are the prompt table's; users leave a single row out."""
        return self.shape.startswith(("[N", "[1 or N"))


def strided(shape: str, role: Role = Role.READ, dtypes: tuple[torch.dtype, ...] = ()) -> TensorSpec:
    """A tensor in any strides with a contiguous last dimension."""
    return TensorSpec(shape, role, dtypes, contiguous=False)


def array(shape: str, *dtypes: torch.dtype, role: Role = Role.READ) -> TensorSpec:
    """A small contiguous tensor, which kernels read as a plain array."""
    return TensorSpec(shape, role, dtypes, contiguous=True)


_DIFFERENTIABLE, _WRITTEN = Role.DIFFERENTIABLE, Role.WRITTEN
_INT32, _FLOAT32 = torch.int32, torch.float32


class Call(NamedTuple):
    """Attention of whole sequences, or of packed ones: then [1, H, total, D] with cu_seqlens."""

    query: Annotated[Tensor, strided("[B, Hq, T, D]", _DIFFERENTIABLE, FLOATS)]
    key: Annotated[Tensor, strided("[B, Hkv, S, D]", _DIFFERENTIABLE)]
    value: Annotated[Tensor, strided("[B, Hkv, S, D]", _DIFFERENTIABLE)]
    # the prompt table; all three None: no prompt branch
    prompt_key: Annotated[Tensor | None, strided("[N, Hkv, P, D]", _DIFFERENTIABLE, FLOATS)] = None
    prompt_value: Annotated[Tensor | None, strided("[N, Hkv, P, D]", _DIFFERENTIABLE, FLOATS)] = None
    # raw, before its activation
    gate: Annotated[Tensor | None, array("[1 or N, Hq]", _FLOAT32, role=_DIFFERENTIABLE)] = None
    # one more score in each query's denominator, in the token branch
    sinks: Annotated[Tensor | None, array("[Hq]", _FLOAT32, role=_DIFFERENTIABLE)] = None
    # each sequence's row of the table, -1 = no prompts; None: row b, or row 0 if there is one row
    prompt_index: Annotated[Tensor | None, array("[B]", _INT32)] = None
    # added to the scaled scores, -inf = masked
    key_bias: Annotated[Tensor | None, array("[B, S]", _FLOAT32)] = None
    # sequence b owns rows cu_seqlens[b] .. cu_seqlens[b + 1]
    cu_seqlens_q: Annotated[Tensor | None, array("[B + 1]", _INT32)] = None
    cu_seqlens_k: Annotated[Tensor | None, array("[B + 1]", _INT32)] = None
    # of the longest sequence, or more
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    # of the scores of both branches
    scale: float = 1.0
    # a score s of either branch becomes softcap * tanh(s / softcap), before bias and mask; 0 = it stays s
    softcap: float = 0.0
    # query i sees keys j with i + S - T - left <= j <= i + S - T + right; -1 = no limit, causal = right 0
    window_left: int = -1
    window_right: int = -1
    # act = tanh, or identity
    tanh_gate: bool = True
    # bool (True = attend) or additive, broadcastable to [B, Hq, T, S]
    dense_mask: Annotated[
        Tensor | None, TensorSpec("[B, Hq, T, S]", Role.UNFUSED, (torch.bool, *FLOATS), False)
    ] = None

    @property
    def batch_size(self) -> int:
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1


class CacheCall(NamedTuple):
    """New queries against a KV cache. New keys are rotated and written behind each sequence's cache_seqlens keys,
    queries are rotated, and attend to all that the cache then holds."""

    query: Annotated[Tensor, strided("[B, T, Hq, D]", dtypes=FLOATS)]
    # [B, S, Hkv, D], or with a block_table pages
    key_cache: Annotated[Tensor, strided("[num_pages, page_size, Hkv, D]", _WRITTEN)]
    value_cache: Annotated[Tensor, strided("[num_pages, page_size, Hkv, D]", _WRITTEN)]
    new_key: Annotated[Tensor | None, strided("[B, T_new, Hkv, D]")]
    new_value: Annotated[Tensor | None, strided("[B, T_new, Hkv, D]")]
    prompt_key: Annotated[Tensor | None, strided("[N, P, Hkv, D]", dtypes=FLOATS)]
    prompt_value: Annotated[Tensor | None, strided("[N, P, Hkv, D]", dtypes=FLOATS)]
    gate: Annotated[Tensor | None, array("[1 or N, Hq]", _FLOAT32)]
    sinks: Annotated[Tensor | None, array("[Hq]", _FLOAT32)]
    prompt_index: Annotated[Tensor | None, array("[B]", _INT32)]
    # keys in the cache before the call, those that cache_leftpad hides too
    cache_seqlens: Annotated[Tensor, array("[B]", _INT32)]
    # the first slots of each sequence that no query sees
    cache_leftpad: Annotated[Tensor | None, array("[B]", _INT32)]
    # page i of each sequence
    block_table: Annotated[Tensor | None, array("[B, max_pages]", _INT32)]
    rotary_cos: Annotated[Tensor | None, array("[positions, rotary_dim / 2]", *FLOATS)]
    rotary_sin: Annotated[Tensor | None, array("[positions, rotary_dim / 2]", *FLOATS)]
    # pairs (2i, 2i + 1), or (i, i + rotary_dim / 2)
    rotary_interleaved: bool
    scale: float
    # as in Call
    softcap: float
    window_left: int
    window_right: int
    tanh_gate: bool
    # pieces that the keys of a sequence are split into; 0 = the backend chooses
    num_splits: int

    def head_major(self) -> CacheCall:
        """The same call with every tensor of four dimensions as [.., H, T, D]: views."""
        turned = {
            name: tensor.transpose(1, 2)
            for name, tensor in self._asdict().items()
            if isinstance(tensor, Tensor) and tensor.dim() == 4
        }
        return CacheCall(**{**self._asdict(), **turned})

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """The attention of a rotated query to keys that are in the cache already, all three head-major."""
        lengths = {"max_seqlen_q": query.shape[2], "max_seqlen_k": key.shape[2]}
        return _attention(self.head_major(), query=query, key=key, value=value, **lengths)


class PromptCall(NamedTuple):
    """The prompt branch alone, added onto `out`."""

    out: Annotated[Tensor, strided("[B, Hq, T, D]", _WRITTEN)]
    query: Annotated[Tensor, strided("[B, Hq, T, D]", dtypes=FLOATS)]
    prompt_key: Annotated[Tensor, strided("[N, Hkv, P, D]", dtypes=FLOATS)]
    prompt_value: Annotated[Tensor, strided("[N, Hkv, P, D]", dtypes=FLOATS)]
    gate: Annotated[Tensor, array("[1 or N, Hq]", _FLOAT32)]
    prompt_index: Annotated[Tensor | None, array("[B]", _INT32)]
    cu_seqlens: Annotated[Tensor | None, array("[B + 1]", _INT32)]
    max_seqlen: int
    scale: float
    softcap: float
    tanh_gate: bool

    def attention(self) -> Call:
        """The attention call without keys, whose output is the prompt branch."""
        query, cu_seqlens = self.query, self.cu_seqlens
        no_keys = query.new_empty((query.shape[0], self.prompt_key.shape[1], 0, query.shape[3]))
        return _attention(
            self,
            key=no_keys,
            value=no_keys,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=None if cu_seqlens is None else torch.zeros_like(cu_seqlens),
            max_seqlen_q=self.max_seqlen,
        )


def _attention(call: CacheCall | PromptCall, **fields: Any) -> Call:
    """The attention call with the fields that it has in common with another call, and with those given."""
    shared = {name: value for name, value in call._asdict().items() if name in Call._fields}
    return Call(**{**shared, **fields})


AnyCall = Call | CacheCall | PromptCall


class Saved(NamedTuple):
    """What the backward operator is given in front of the `Call`; behind it comes `needs`."""

    grad_out: Annotated[Tensor, strided("[B, Hq, T, D]")]
    grad_lse: Annotated[Tensor | None, array("[B, Hq, T]", _FLOAT32)]
    # stored [B, T, Hq, D]
    out: Annotated[Tensor, strided("[B, Hq, T, D]")]
    # natural logarithm, of the token branch with its sink, -inf for a query without keys and sink
    lse: Annotated[Tensor, array("[B, Hq, T]", _FLOAT32)]


_SCHEMA_NUMBERS = {int: "SymInt", float: "float", bool: "bool"}


class Form:
    """The operator's arguments that a call's fields describe, in their order: tensors, then numbers.

    specs: the tensors by name. optional: the names of those that may be None. differentiable: the names of those
    that backward returns gradients for; they come first, so a gradient's number is its argument's. parameters:
    all arguments, as an operator's schema writes them.
    """

    def __init__(self, call: type) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.numbers: dict[str, type] = {}
        self.optional: set[str] = set()
        parameters = []
        for name, hint in get_type_hints(call, include_extras=True).items():
            if get_origin(hint) is not Annotated:
                self.numbers[name] = hint
                parameters.append(f"{_SCHEMA_NUMBERS[hint]} {name}")
                continue
            kind, spec = get_args(hint)
            if spec.role is Role.UNFUSED:
                continue
            assert not self.numbers, f"{call.__name__}.{name}: tensors come before numbers"
            if kind is not Tensor:
                self.optional.add(name)
            alias = f"({'abc'[sum('!' in p for p in parameters)]}!)" if spec.role is Role.WRITTEN else ""
            parameters.append(f"Tensor{alias}{'?' if name in self.optional else ''} {name}")
            self.specs[name] = spec
        self.names = (*self.specs, *self.numbers)
        assert self.names == call._fields[: len(self.names)], f"{call.__name__}: unfused fields come last"  # type: ignore[attr-defined]
        self.differentiable = tuple(n for n, spec in self.specs.items() if spec.role is Role.DIFFERENTIABLE)
        assert self.differentiable == self.names[: len(self.differentiable)]
        self.parameters = ", ".join(parameters)

    def arguments(self, call: tuple[Any, ...]) -> tuple[Any, ...]:
        """The operator's arguments, out of a call."""
        return call[: len(self.names)]

    def split(self, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(tensors, numbers) of an operator's arguments."""
        return arguments[: len(self.specs)], arguments[len(self.specs) :]


CALL = Form(Call)
CACHE_CALL = Form(CacheCall)
PROMPT_CALL = Form(PromptCall)
SAVED = Form(Saved)
# The tensors of `zero_init_attention` that come to the operator as they are, or with one more dimension in front.
PUBLIC_TENSORS = (*CALL.differentiable, "prompt_index")
assert CALL.names[: len(PUBLIC_TENSORS)] == PUBLIC_TENSORS


def from_backward_arguments(arguments: tuple[Any, ...]) -> tuple[Saved, Call, int]:
    """(saved, call, needs) of the backward operator's arguments; bit i of `needs` asks for the i-th gradient."""
    *given, needs = arguments
    return Saved(*given[: len(SAVED.names)]), Call(*given[len(SAVED.names) :]), needs


@functools.cache
def batched(name: str) -> bool:
    """Whether a differentiable argument holds tokens of the batch: its gradient is then stored token-major, as `out`
    is; the others' gradients are contiguous."""
    spec = CALL.specs[name]
    return spec.dims == 4 and spec.shape.startswith("[B,")
