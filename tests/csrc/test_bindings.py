"""The compiled operators called directly: each binding refuses by itself, and by name, what its kernels cannot read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT, search_path

from zinit_kernels import zero_init_attention, zero_init_attention_with_kvcache
from zinit_kernels.backends import extension
from zinit_kernels.call import CALL

pytestmark = pytest.mark.native

B, HEADS, TOKENS, KEYS, DIM, PROMPTS = 2, 4, 5, 7, 16, 3


def arguments_of(stage: str) -> dict:
    """A valid call with every tensor given, by the names of the schema."""
    token_major = stage == "decode"

    def tensor(tokens, heads=2, batch=B):
        return (
            torch.randn(batch, tokens, heads, DIM) if token_major else torch.randn(batch, heads, tokens, DIM)
        )

    table = {
        "prompt_key": tensor(PROMPTS, batch=3),
        "prompt_value": tensor(PROMPTS, batch=3),
        "gate": torch.rand(3, HEADS),
        "sinks": torch.randn(HEADS),
        "prompt_index": torch.tensor([2, -1], dtype=torch.int32),
    }
    last = {"scale": 0.3, "softcap": 1.3, "window_left": -1, "window_right": 0, "tanh_gate": True}
    if stage == "decode":
        return {
            "query": tensor(1, HEADS), "key_cache": tensor(8, batch=4), "value_cache": tensor(8, batch=4),
            "new_key": tensor(1), "new_value": tensor(1), **table,
            "cache_seqlens": torch.tensor([3, 9], dtype=torch.int32),
            "cache_leftpad": torch.tensor([1, 9], dtype=torch.int32),
            "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
            "rotary_cos": torch.rand(16, 4), "rotary_sin": torch.rand(16, 4), "rotary_interleaved": True, **last,
            "num_splits": 1,
        }  # fmt: skip
    attention = {"query": tensor(TOKENS, HEADS), "key": tensor(KEYS), "value": tensor(KEYS)}
    packing = {
        "key_bias": torch.zeros(B, KEYS),
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "max_seqlen_q": TOKENS,
        "max_seqlen_k": KEYS,
    }
    if stage == "forward":
        return {**attention, **table, **packing, **last}
    out, lse = tensor(TOKENS, HEADS), torch.randn(B, HEADS, TOKENS)
    return {
        "grad_out": torch.randn_like(out), "grad_lse": torch.randn_like(lse), "out": out, "lse": lse, **attention,
        **table, **packing, **last, "needs": 127,
    }  # fmt: skip


def packed(stage: str) -> dict:
    """The same call with cumulative lengths."""
    given = arguments_of(stage)
    for name, tensor in given.items():
        if name in ("query", "key", "value", "out", "grad_out", "lse", "grad_lse"):
            given[name] = tensor[:1].contiguous()
    ends = {"cu_seqlens_q": [0, 2, TOKENS], "cu_seqlens_k": [0, 6, KEYS]}
    return {**given, **{name: torch.tensor(end, dtype=torch.int32) for name, end in ends.items()}}


def call(stage: str, given: dict, backend: str = "cpu"):
    return getattr(torch.ops.zinit, f"{stage}_{backend}").default(**given)


CALLS = {
    "forward": arguments_of, "forward packed": packed, "backward": arguments_of, "backward packed": packed,
    "decode": arguments_of,
}  # fmt: skip
ARGUMENTS = [
    (form, name)
    for form, make in CALLS.items()
    for name, value in make(form.split()[0]).items()
    if torch.is_tensor(value) and ("packed" not in form or "cu_seqlens" in name)
]


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """Its storage is gone, as that of a parameter between FSDP's uses."""
    tensor.untyped_storage().resize_(0)
    return tensor


def shortened(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(tensor.nbytes - tensor.element_size())
    return tensor


FOREIGN = {
    "meta": (lambda tensor: tensor.to("meta"), "on the device of|on the CPU"),
    "sparse": (lambda tensor: tensor.to_sparse(), r"strided \(dense\), got sparse_coo"),
    "freed": (freed, "has no memory for all of its elements"),
    "shortened": (shortened, "has no memory for all of its elements"),
}


@pytest.mark.parametrize("form", CALLS)
def test_the_calls_below_are_valid(form):
    given = CALLS[form](form.split()[0])
    assert list(given) == [
        a.name for a in getattr(torch.ops.zinit, f"{form.split()[0]}_cpu").default._schema.arguments
    ]
    call(form.split()[0], given)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("form, name", ARGUMENTS)
def test_a_tensor_that_is_no_plain_cpu_tensor_is_refused_by_name(form, name, kind):
    given = CALLS[form](form.split()[0])
    convert, words = FOREIGN[kind]
    given[name] = convert(given[name].clone())
    # the fake that the dispatcher calls for meta tensors compares with the first tensor
    named = "" if kind == "meta" and name in ("query", "grad_out") else f"{name} "
    with pytest.raises(RuntimeError, match=f"{named}.*({words})"):
        call(form.split()[0], given)


@pytest.mark.parametrize("stage", ["forward", "decode", "prompt"])
def test_the_cuda_operators_refuse_tensors_of_the_cpu_by_name(stage):
    if reason := extension.why_unavailable("cuda"):
        pytest.skip(reason)
    if stage == "prompt":
        table = torch.randn(1, 2, 3, 16)
        query = torch.randn(1, 4, 5, 16)
        given = dict(enumerate((query, query, table, table, torch.rand(1, 4), None, None, 5, 0.3, True)))
    else:
        given = arguments_of(stage)
    with pytest.raises(RuntimeError, match="query must be on cuda:0, got the CPU"):
        call(stage, given, "cuda")


OTHER_THREAD = """
import threading, time
import torch
import test_bindings as t

CALLS = (
    ("decode", "cache_seqlens", 1), ("decode", "block_table", 0), ("decode", "prompt_index", 0),
    ("forward", "cu_seqlens_k", 1), ("forward", "prompt_index", 0),
)
for stage, name, at in CALLS:
    given = t.packed(stage) if name.startswith("cu_") else t.arguments_of(stage)
    if stage == "decode":  # long enough for a number to change between its check and its use
        for cache in ("key_cache", "value_cache"):
            given[cache] = torch.randn(4, 8192, 2, t.DIM)
        given["cache_seqlens"].fill_(8000)
        given["rotary_cos"] = given["rotary_sin"] = torch.rand(8192, 4)
    tensor, right, changes, done = given[name], int(given[name].view(-1)[at]), 0, False

    def change():
        global changes
        flat = tensor.view(-1)
        while not done:
            flat[at] = 2**30
            flat[at] = right
            changes += 1

    other = threading.Thread(target=change, daemon=True)  # an assertion that fails ends the program
    other.start()
    outcomes = {"ran": 0, "refused": 0}
    end = time.monotonic() + 0.3
    while time.monotonic() < end or not changes:
        try:
            t.call(stage, given)
            outcomes["ran"] += 1
        except RuntimeError as error:
            assert name in str(error), error
            outcomes["refused"] += 1
    done = True
    other.join()
    print(stage, name, changes, "changes,", outcomes, flush=True)
"""


def test_another_thread_that_changes_lengths_during_a_call_moves_no_access():
    environment = {**os.environ, "PYTHONPATH": search_path(Path(__file__).parent, ROOT / "tests" / "support")}
    ran = subprocess.run(
        [sys.executable, "-c", OTHER_THREAD], capture_output=True, text=True, env=environment
    )
    print(ran.stdout)
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stdout} {ran.stderr}"


@pytest.mark.parametrize("queries", [0, TOKENS])
@pytest.mark.parametrize("heads", [0, HEADS])
@pytest.mark.parametrize("form", ["backward", "backward packed"])
def test_gradients_of_keys_that_no_query_reads_are_zero(form, heads, queries):
    """Outputs start as NaN here. Without a query head or a query nothing else would write them."""
    if heads and queries:
        return
    given = CALLS[form]("backward")
    for name in ("query", "out", "grad_out"):
        given[name] = given[name][:, :heads, :queries]
    for name in ("lse", "grad_lse"):
        given[name] = given[name][:, :heads, :queries].contiguous()
    given["gate"], given["sinks"] = given["gate"][:, :heads].contiguous(), given["sinks"][:heads]
    if given["cu_seqlens_q"] is not None:
        given["cu_seqlens_q"].clamp_(max=queries)
    for name, gradient in zip(CALL.differentiable, call("backward", given), strict=True):
        assert gradient.shape == given[name].shape and (gradient == 0).all(), name


def cache_call(**changes):
    torch.manual_seed(0)
    call = {
        "q": torch.randn(2, 3, 4, 16), "k_cache": torch.randn(2, 8, 2, 16), "v_cache": torch.randn(2, 8, 2, 16),
        "k": torch.randn(2, 3, 2, 16), "v": torch.randn(2, 3, 2, 16), "prompt_k": None, "prompt_v": None, "gate": None,
        "cache_seqlens": torch.tensor([2, 5], dtype=torch.int32), "causal": True,
    }  # fmt: skip
    return zero_init_attention_with_kvcache, {**call, **changes}


def attention_call(tokens=3, keys=4, batch=2, **changes):
    torch.manual_seed(0)
    call = {
        "query": torch.randn(batch, 4, tokens, 16), "key": torch.randn(batch, 2, keys, 16),
        "value": torch.randn(batch, 2, keys, 16),
    }  # fmt: skip
    return zero_init_attention, {**call, "prompt_key": None, "prompt_value": None, "gate": None, **changes}


def no_rows(*shape):
    return {"prompt_k": torch.empty(*shape), "prompt_v": torch.empty(*shape)}


NOTHING = torch.empty(0, 8)


def rotated(table):
    return cache_call(rotary_cos=table, rotary_sin=table, rotary_interleaved=True)


EMPTY = {  # arguments that are given and have no elements: nothing else says that they are given
    "rotary tables without positions": lambda: rotated(NOTHING),
    "rotary tables without columns": lambda: rotated(NOTHING.T),
    "pages of no entries": lambda: cache_call(block_table=torch.empty(2, 0, dtype=torch.int32)),
    "pages and nothing to append": lambda: cache_call(
        k=None, v=None, block_table=torch.empty(2, 0, dtype=torch.int32),
        cache_seqlens=torch.zeros(2, dtype=torch.int32),
    ),
    "no new keys": lambda: cache_call(k=torch.empty(2, 0, 2, 16), v=torch.empty(2, 0, 2, 16)),
    "no prompts": lambda: cache_call(**no_rows(1, 0, 2, 16), gate=torch.ones(4)),
    "an empty table, indexed": lambda: cache_call(
        **no_rows(0, 3, 2, 16), gate=torch.empty(0, 4), prompt_index=torch.full((2,), -1, dtype=torch.int32)
    ),
    "an empty table, not indexed": lambda: cache_call(**no_rows(0, 3, 2, 16), gate=torch.empty(0, 4)),
    "a cache of no slots": lambda: cache_call(k_cache=torch.empty(2, 0, 2, 16), v_cache=torch.empty(2, 0, 2, 16)),
    "a mask of no keys": lambda: attention_call(keys=0, attn_mask=torch.empty(2, 0, dtype=torch.bool)),
    "an empty batch with an index": lambda: attention_call(
        batch=0, prompt_key=torch.randn(3, 2, 2, 16), prompt_value=torch.randn(3, 2, 2, 16), gate=torch.ones(4),
        prompt_index=torch.empty(0, dtype=torch.int32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_what_is_given_without_elements_counts_as_given(name):
    outcomes = []
    for backend in ("cpu", "reference"):
        function, arguments = EMPTY[name]()
        try:
            out = function(**arguments, backend=backend)
            outcomes.append([out, arguments.get("k_cache"), arguments.get("v_cache")])
        except (ValueError, RuntimeError):
            outcomes.append("refused")
    ours, expected = outcomes
    assert (ours == "refused") == (expected == "refused"), outcomes
    if ours != "refused":
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_rotary_tables_without_positions_are_refused_by_the_operator():
    given = arguments_of("decode")
    given["rotary_cos"], given["rotary_sin"] = NOTHING[:, :4], NOTHING[:, :4]
    with pytest.raises(RuntimeError, match="rotary_cos has 0 positions, sequence 0 needs 4"):
        call("decode", given)
