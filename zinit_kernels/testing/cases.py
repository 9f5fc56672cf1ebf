"""The named cases every backend is judged by, and the factory of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..api import zero_init_attention, zero_init_attention_varlen

GRADIENTS = ("query", "key", "value", "prompt_key", "prompt_value", "gate")


@dataclass(frozen=True)
class _AnyCase:
    """What every case says."""

    name: str
    heads_q: int = 4
    heads_kv: int = 4
    head_dim: int = 64
    prompt_length: int = 10
    table: str = "shared"  # shared | per_sample | indexed | none
    gate_activation: str = "tanh"
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    prompt_dtype: torch.dtype | None = None  # None: as query
    sinks: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Case(_AnyCase):
    """One attention call; `seqlens_*` of more than one length make it a packed one."""

    batch: int = 2
    seqlens_q: tuple[int, ...] = (63,)
    seqlens_k: tuple[int, ...] | None = None  # None: as seqlens_q
    mask: str = "none"  # none | padding | left_padding | additive | all_masked | dense
    gate: str = "per_head"  # per_head | scalar | zero | per_row
    layout: str = "contiguous"  # contiguous | token_major | sliced
    scale: float | None = None
    packed: bool = False


CASES = [
    Case("plain"),
    Case("one_query", seqlens_q=(1,), causal=False),
    Case("one_token", batch=1, heads_q=1, heads_kv=1, seqlens_q=(1,), head_dim=16),
    Case("odd", seqlens_q=(111,), head_dim=80),
    Case("tiny_head", seqlens_q=(37,), head_dim=5, prompt_length=3),
    Case("head_dim_1", seqlens_q=(17,), head_dim=1, prompt_length=2),
    Case("head_dim_96", seqlens_q=(65,), head_dim=96),
    Case("head_dim_128", seqlens_q=(130,), head_dim=128),
    Case("head_dim_256", batch=1, heads_q=2, heads_kv=2, seqlens_q=(70,), head_dim=256),
    Case("bidirectional", causal=False, seqlens_q=(111,)),
    Case("cross", causal=False, seqlens_q=(33,), seqlens_k=(95,)),
    Case("cross_short_keys", causal=False, seqlens_q=(95,), seqlens_k=(7,)),
    Case("grouped", heads_q=8, heads_kv=2, seqlens_q=(97,)),
    Case("multi_query", heads_q=6, heads_kv=1, seqlens_q=(50,), head_dim=40),
    Case("window", window=(16, -1), seqlens_q=(200,)),
    Case("window_both_sides", causal=False, window=(9, 5), seqlens_q=(111,)),
    Case("window_zero", window=(0, 0), seqlens_q=(40,)),
    Case("padding", mask="padding", batch=3),
    Case("left_padding", mask="left_padding", batch=3),
    Case("additive", mask="additive", causal=False),
    Case("all_masked", mask="all_masked"),
    Case("long", batch=1, heads_q=2, heads_kv=1, seqlens_q=(517,), head_dim=64),
    Case("no_prompt", table="none"),
    Case("prompt_length_0", prompt_length=0),
    Case("prompt_length_1", prompt_length=1),
    Case("prompt_length_128", prompt_length=128, seqlens_q=(35,)),
    Case("per_sample", table="per_sample", batch=3),
    Case("indexed", table="indexed", batch=5, gate="per_row"),
    Case("indexed_one_gate", table="indexed", batch=4),
    Case("scalar_gate", gate="scalar", gate_activation="identity"),
    Case("gate_zero", gate="zero"),
    Case("float32_prompts", prompt_dtype=torch.float32, gate_activation="identity"),
    Case("bfloat16_prompts", prompt_dtype=torch.bfloat16),
    Case("token_major", layout="token_major", heads_q=4, heads_kv=2),
    Case("sliced", layout="sliced", seqlens_q=(45,), head_dim=24),
    Case("scaled", scale=0.2, seqlens_q=(41,)),
    Case("softcap", softcap=1.5, heads_q=8, heads_kv=2, seqlens_q=(97,)),
    Case("softcap_padding", softcap=0.7, mask="padding", batch=3, head_dim=80, table="indexed", gate="per_row"),
    Case("softcap_additive", softcap=2.0, mask="additive", causal=False, seqlens_q=(111,), head_dim=40, scale=-0.4),
    Case("softcap_window", softcap=50.0, window=(9, -1), seqlens_q=(70,), scale=3.0, prompt_length=128),
    Case("softcap_packed", softcap=1.0, packed=True, seqlens_q=(7, 40, 3), seqlens_k=(31, 12, 3)),
    Case("no_queries", seqlens_q=(0,)),
    Case("no_keys", seqlens_q=(9,), seqlens_k=(0,), causal=False),
    Case("packed", packed=True, seqlens_q=(17, 1, 63, 30), seqlens_k=(17, 1, 63, 30)),
    Case("packed_grouped", packed=True, heads_q=8, heads_kv=2, seqlens_q=(5, 64, 33), table="indexed", gate="per_row"),
    Case("packed_bottom_right", packed=True, seqlens_q=(7, 40, 3), seqlens_k=(31, 12, 3)),
    Case("packed_empty", packed=True, seqlens_q=(0, 20, 0, 5), seqlens_k=(4, 20, 0, 0), causal=False),
    Case("packed_window", packed=True, seqlens_q=(90, 33), window=(11, 0), table="per_sample"),
]  # fmt: skip

SINK_CASES = [
    Case("sinks", heads_kv=2, seqlens_q=(150,), sinks=True),
    Case("sinks_without_prompts", seqlens_q=(33,), seqlens_k=(95,), causal=False, table="none", sinks=True),
    Case("sinks_all_masked", mask="all_masked", sinks=True),
    Case("sinks_without_keys", seqlens_q=(9,), seqlens_k=(0,), causal=False, sinks=True),
    Case("sinks_window", window=(16, -1), seqlens_q=(90,), head_dim=80, softcap=2.0, sinks=True),
    Case(
        "sinks_packed", packed=True, heads_q=8, heads_kv=2, seqlens_q=(7, 40, 3, 5), seqlens_k=(31, 12, 3, 0),
        sinks=True,
    ),
]  # fmt: skip


@dataclass
class Inputs:
    """The arguments of one public call, in its own layout."""

    case: Case
    tensors: dict[str, Tensor | None]  # keyed by GRADIENTS, and "sinks" where the case has them
    options: dict[str, Any]

    def call(self, backend: str, **overrides: Any) -> tuple[Tensor, Tensor]:
        """(out [B, H, T, D] or [1, H, total, D], lse) through the public function."""
        tensors = self.tensors
        named = [tensors[name] for name in GRADIENTS]
        options = {**self.options, "sinks": tensors.get("sinks"), "backend": backend, **overrides}
        want_lse = options.setdefault("return_lse", True)
        function = zero_init_attention_varlen if self.case.packed else zero_init_attention
        result = function(*named, **options)
        out, lse = result if want_lse else (result, None)
        if self.case.packed:
            return out.transpose(0, 1)[None], lse if lse is None else lse[None]
        return out, lse

    def canonical(self) -> arguments.Call:
        convert = arguments.from_varlen if self.case.packed else arguments.from_sdpa
        function = zero_init_attention_varlen if self.case.packed else zero_init_attention
        defaults = dict(function.__kwdefaults__)
        defaults.update(self.options, sinks=self.tensors.get("sinks"))
        defaults.pop("return_lse")
        defaults.pop("backend")
        return convert(*(self.tensors[name] for name in GRADIENTS), **defaults)

    def to(self, dtype: torch.dtype | None) -> Inputs:
        """The same values as fresh leaves, in another dtype; None keeps each tensor's own."""
        tensors = {
            name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
            for name, t in self.tensors.items()
        }
        return Inputs(self.case, tensors, self.options)


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Inputs:
    """Random inputs of a case, gates well away from zero unless the case says so; padding filled with NaN."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    lengths_q = case.seqlens_q
    lengths_k = case.seqlens_k or lengths_q
    batch = len(lengths_q) if case.packed else case.batch
    rows = {"shared": 1, "none": 1, "per_sample": batch, "indexed": 3}[case.table]
    options: dict[str, Any] = {"gate_activation": case.gate_activation}
    if case.packed:
        total_q, total_k = sum(lengths_q), sum(lengths_k)
        query = normal(total_q, case.heads_q, case.head_dim)
        key, value = (
            normal(total_k, case.heads_kv, case.head_dim),
            normal(total_k, case.heads_kv, case.head_dim),
        )
        table_shape: tuple[int, ...] = (rows, case.prompt_length, case.heads_kv, case.head_dim)
        options.update(
            cu_seqlens_q=cumulative(lengths_q).to(device), cu_seqlens_k=cumulative(lengths_k).to(device),
            max_seqlen_q=max(lengths_q), max_seqlen_k=max(lengths_k), causal=case.causal, window_size=case.window,
            softmax_scale=case.scale, softcap=case.softcap,
        )  # fmt: skip
    else:
        seqlen_q, seqlen_k = lengths_q[0], lengths_k[0]
        query = normal(batch, case.heads_q, seqlen_q, case.head_dim)
        key = normal(batch, case.heads_kv, seqlen_k, case.head_dim)
        value = normal(batch, case.heads_kv, seqlen_k, case.head_dim)
        table_shape = (rows, case.heads_kv, case.prompt_length, case.head_dim)
        mask = _mask(case, batch, seqlen_q, seqlen_k, random)
        if mask is not None:
            if mask.dtype == torch.bool and case.mask != "dense":
                for tensor in (key, value):
                    tensor.masked_fill_(~mask[:, 0, 0, :][:, None, :, None], float("nan"))
            options["attn_mask"] = mask.to(device)
        options.update(is_causal=case.causal, scale=case.scale, softcap=case.softcap)
        options["window_size"] = None if case.window == (-1, -1) else case.window
    prompt_key, prompt_value = normal(*table_shape), normal(*table_shape)
    gate = {
        "per_head": lambda: normal(case.heads_q) + 0.3,
        "scalar": lambda: torch.tensor([0.7]),
        "zero": lambda: torch.zeros(case.heads_q),
        "per_row": lambda: normal(rows, case.heads_q) - 0.2,
    }[case.gate]()
    tensors: dict[str, Tensor | None] = {}
    for name, tensor in zip(GRADIENTS, (query, key, value, prompt_key, prompt_value, gate), strict=True):
        kind = torch.float32 if name == "gate" else case.prompt_dtype or dtype if "prompt" in name else dtype
        tensor = tensor.to(device, kind)
        if name in ("query", "key", "value"):
            tensor = _lay_out(tensor, case.layout)
        tensors[name] = tensor.detach().requires_grad_()
    if case.table == "none":
        tensors.update(prompt_key=None, prompt_value=None, gate=None)
    elif case.table == "indexed":
        index = torch.randint(0, rows, (batch,), generator=random, dtype=torch.int32)
        index[batch // 2] = -1
        options["prompt_index"] = index.to(device)
        unused = [row for row in range(rows) if row not in index.tolist()]
        for name in ("prompt_key", "prompt_value", *(["gate"] if case.gate == "per_row" else [])):
            tensors[name].data[unused] = float("nan")
    if case.sinks:  # from negligible to as large as all keys together
        tensors["sinks"] = torch.linspace(-3, 5, case.heads_q).to(device).requires_grad_()
    return Inputs(case, tensors, options)


def cumulative(lengths: Sequence[int]) -> Tensor:
    """int32 cu_seqlens [B + 1] of sequence lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "token_major":
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":  # columns of a wider, NaN-filled buffer, as a slice of a fused qkv projection is
        wide = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1]), float("nan"))
        view = wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]]
        return view.copy_(tensor)
    return tensor


def _mask(case: Case, batch: int, seqlen_q: int, seqlen_k: int, random: torch.Generator) -> Tensor | None:
    if case.mask == "none":
        return None
    if case.mask == "dense":
        return torch.rand(batch, 1, seqlen_q, seqlen_k, generator=random) > 0.3
    if case.mask == "additive":
        return torch.randn(batch, 1, 1, seqlen_k, generator=random)
    lengths = torch.randint(1, max(seqlen_k, 2), (batch, 1), generator=random)
    slot = torch.arange(seqlen_k)[None, :]
    keep = slot >= lengths if case.mask == "left_padding" else slot < lengths
    if case.mask == "all_masked":
        keep[-1] = False
    return keep[:, None, None, :]


@dataclass(frozen=True)
class CacheCase(_AnyCase):
    """One call of the cache function."""

    seqlens: tuple[int, ...] = (0, 37, 100)  # keys in the cache before the call, by sequence
    seqlen_q: int = 1
    append: bool = True
    capacity: int = 128
    page_size: int = 0  # 0: contiguous
    leftpad: tuple[int, ...] = ()  # slots at the start of each sequence that hold NaN; (): none
    cache_rows: tuple[int, ...] = ()  # of each sequence, in contiguous caches of more rows; (): row b
    head_major: bool = False
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    num_splits: int = 0


CACHE_CASES = [
    CacheCase("one_token"),
    CacheCase("head_major", head_major=True),
    CacheCase("grouped", heads_q=8, heads_kv=2, head_dim=128),
    CacheCase("multi_query", heads_q=6, heads_kv=1, head_dim=80),
    CacheCase("wide_group", heads_q=16, heads_kv=1, head_dim=64, seqlens=(15, 16)),
    CacheCase("chunk", seqlen_q=7, heads_q=8, heads_kv=2),
    CacheCase("prefill", seqlen_q=45, seqlens=(0, 3), head_major=True),
    CacheCase("no_append", append=False, seqlens=(1, 37, 128)),
    CacheCase("no_append_empty", append=False, seqlens=(0, 5)),
    CacheCase("bidirectional", causal=False, seqlen_q=3),
    CacheCase("window", window=(20, -1), seqlens=(90, 5, 0), seqlen_q=2),
    CacheCase("paged", page_size=16, capacity=128, heads_q=8, heads_kv=2),
    CacheCase("paged_chunk", page_size=32, seqlen_q=19, seqlens=(31, 32, 33)),
    CacheCase("paged_head_major", page_size=16, head_major=True, seqlens=(15, 17, 111)),
    CacheCase("batch_idx", cache_rows=(4, 0, 2), heads_q=8, heads_kv=2),
    CacheCase("batch_idx_rotary", cache_rows=(1, 3, 0), rotary_dim=64, seqlen_q=3, head_major=True, capacity=111),
    CacheCase("batch_idx_prefill", cache_rows=(2, 0), seqlen_q=45, seqlens=(0, 37), window=(30, 0)),
    CacheCase("leftpad", leftpad=(0, 5, 100), heads_q=8, heads_kv=2),
    CacheCase("leftpad_paged", leftpad=(0, 17, 3), page_size=16, rotary_dim=32, seqlen_q=3, num_splits=2),
    CacheCase("leftpad_window", leftpad=(0, 17, 80), window=(30, 0), seqlen_q=5),
    CacheCase("leftpad_prefill", leftpad=(3, 0), seqlen_q=45, seqlens=(37, 3), causal=False, head_major=True),
    CacheCase("leftpad_read", leftpad=(1, 37, 64), append=False, seqlens=(1, 37, 128), cache_rows=(4, 0, 2)),
    CacheCase("rotary", rotary_dim=64, seqlen_q=3),
    CacheCase("rotary_interleaved", rotary_dim=32, rotary_interleaved=True, seqlen_q=2, heads_q=8, heads_kv=4),
    CacheCase("rotary_paged_bidirectional", rotary_dim=64, page_size=16, causal=False, seqlen_q=2),
    CacheCase("split", num_splits=3, seqlens=(127, 1), heads_q=2, heads_kv=1),
    CacheCase("long", capacity=3000, seqlens=(2998,), heads_q=2, heads_kv=1),
    CacheCase("softcap", softcap=0.8, heads_q=8, heads_kv=2, rotary_dim=32, page_size=16, seqlen_q=3),
    CacheCase("softcap_one", softcap=2.0, heads_q=4, heads_kv=2, head_dim=128, append=False, seqlens=(1, 128)),
    CacheCase("softcap_split", softcap=1.0, num_splits=3, seqlens=(127, 1), head_dim=80, window=(90, 0)),
    CacheCase("softcap_prefill", softcap=30.0, seqlen_q=45, seqlens=(0, 3), table="per_sample"),
    CacheCase("odd_head", head_dim=37, heads_q=2, heads_kv=2),
    CacheCase("head_dim_256", head_dim=256, heads_q=2, heads_kv=1),
    CacheCase("per_sample", table="per_sample"),
    CacheCase("indexed", table="indexed", gate_activation="identity"),
    CacheCase("no_prompt", table="none"),
    CacheCase("prompt_length_0", prompt_length=0),
    CacheCase("float32_prompts", prompt_dtype=torch.float32),
]  # fmt: skip

SINK_CACHE_CASES = [
    CacheCase("sinks", heads_q=8, heads_kv=2, sinks=True),
    CacheCase("sinks_split", num_splits=3, seqlens=(127, 1, 0), heads_kv=1, seqlen_q=2, capacity=160, sinks=True),
    CacheCase("sinks_chunk", seqlen_q=19, seqlens=(0, 3, 90), page_size=16, sinks=True),
    CacheCase("sinks_empty", append=False, seqlens=(0, 5), num_splits=2, sinks=True),
    CacheCase("sinks_without_prompts", table="none", window=(20, -1), seqlens=(90, 5, 0), sinks=True),
]  # fmt: skip


def make_cache_arguments(
    case: CacheCase, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments of the cache function; unused slots and dead pages hold NaN, unused page ids are absurd."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    batch, heads_kv, head_dim = len(case.seqlens), case.heads_kv, case.head_dim
    page_size = case.page_size or case.capacity
    pages_each = -(-case.capacity // page_size)
    num_blocks = batch * pages_each + (3 if case.page_size or case.cache_rows else 0)
    shape = (
        (num_blocks, heads_kv, page_size, head_dim)
        if case.head_major
        else (num_blocks, page_size, heads_kv, head_dim)
    )
    caches = [torch.full(shape, float("nan")).to(dtype) for _ in range(2)]
    if case.head_major:
        caches = [cache.transpose(1, 2) for cache in caches]
    order = torch.randperm(num_blocks, generator=random) if case.page_size else torch.arange(num_blocks)
    table = order[: batch * pages_each].reshape(batch, pages_each)
    if case.cache_rows:
        table = torch.tensor(case.cache_rows)[:, None]
    for sequence, seqlen in enumerate(case.seqlens):
        for cache in caches:
            for position in range(case.leftpad[sequence] if case.leftpad else 0, seqlen):
                cache[table[sequence, position // page_size], position % page_size] = normal(
                    heads_kv, head_dim
                )
    block_table = table.to(torch.int32)
    for sequence, seqlen in enumerate(case.seqlens):
        used = -(-(seqlen + (case.seqlen_q if case.append else 0)) // page_size)
        block_table[sequence, used:] = 2147480000
    rows = {"shared": 1, "none": 1, "per_sample": batch, "indexed": 4}[case.table]
    arguments_: dict[str, Any] = {
        "q": normal(batch, case.seqlen_q, case.heads_q, head_dim),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "cache_seqlens": torch.tensor(case.seqlens, dtype=torch.int32),
        "cache_leftpad": torch.tensor(case.leftpad, dtype=torch.int32) if case.leftpad else None,
        "cache_batch_idx": table[:, 0].to(torch.int32) if case.cache_rows else None,
        "block_table": block_table if case.page_size else None,
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "num_splits": case.num_splits,
        "gate_activation": case.gate_activation,
        "rotary_interleaved": case.rotary_interleaved,
    }
    for name in ("k", "v"):
        arguments_[name] = normal(batch, case.seqlen_q, heads_kv, head_dim) if case.append else None
    if case.rotary_dim:
        frequency = 100.0 ** -(torch.arange(case.rotary_dim // 2) / (case.rotary_dim // 2))
        angle = torch.arange(case.capacity + 8)[:, None] * frequency[None, :]
        arguments_.update(rotary_cos=angle.cos().to(dtype), rotary_sin=angle.sin().to(dtype))
    for name in ("prompt_k", "prompt_v"):
        prompts = normal(rows, case.prompt_length, heads_kv, head_dim).to(case.prompt_dtype or dtype)
        arguments_[name] = None if case.table == "none" else prompts
    arguments_["gate"] = None if case.table == "none" else normal(rows, case.heads_q).float() + 0.3
    if case.table == "indexed":
        arguments_["prompt_index"] = torch.tensor([-1, *range(1, batch)], dtype=torch.int32)
    if case.sinks:
        arguments_["sinks"] = torch.linspace(-3, 5, case.heads_q)
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments_.items()}
