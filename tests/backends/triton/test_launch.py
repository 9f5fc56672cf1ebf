"""What the launches ask of compiler and host, without the interpreter, on CPU tensors.

A stand-in driver says that the chip is an H100, and a hook records every kernel that would be compiled.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zinit_kernels.arguments import from_cache
from zinit_kernels.call import CALL
from zinit_kernels.testing import CacheCase, Case, make_cache_arguments, make_inputs

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from zinit_kernels.backends.triton import configs, launch, ranges, tuning  # noqa: E402


class H100:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """The (kernel, specialisation) pairs that were asked for; none is compiled or run."""
    found = []

    def record(key, fn, **_):
        found.append((fn.name.split(".")[-1], key))
        return True

    triton.runtime.driver.set_active(H100())
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", record)
    monkeypatch.setattr(launch, "arch_of", lambda tensor: 90)
    monkeypatch.setattr(launch, "num_processors", lambda tensor: 132)
    yield found
    triton.runtime.driver.set_active(None)  # the default one, which is found when it is needed


def attend(case, dtype=torch.float16, needs=0b111111):
    inputs = make_inputs(case, dtype)
    args = [a.detach() if torch.is_tensor(a) else a for a in CALL.arguments(inputs.canonical())]
    out, lse = launch.forward(*args)
    launch.backward(torch.empty_like(out), torch.empty_like(lse), out, lse, *args, needs)


def canonical(case, **overrides):
    absent = dict.fromkeys(("softmax_scale", "prompt_index", "rotary_cos", "rotary_sin"))
    return from_cache(**absent | make_cache_arguments(case, torch.float16) | overrides)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_one_kernel_for_all_lengths(compiled, packed, head_dim):
    for batch, length in ((2, 5), (3, 16), (2, 17), (2, 64), (4, 100), (2, 128), (2, 1000), (16, 48)):
        lengths = (length,) * batch if packed else (length,)
        attend(Case("any", batch=batch, packed=packed, seqlens_q=lengths, heads_kv=2, head_dim=head_dim))
    names = {name for name, _ in compiled}
    assert names == {
        "zinit_forward_kernel", "zinit_partial_sums_kernel", "zinit_add_partials_kernel",
        "zinit_grad_key_value_kernel", "zinit_grad_query_kernel",
    }  # fmt: skip
    assert len(set(compiled)) == len(names), sorted(name for name, _ in set(compiled))


@pytest.mark.parametrize("page_size", [0, 16])
def test_two_decode_kernels_for_all_lengths(compiled, page_size):
    for batch, capacity, seqlen_q in ((3, 128, 1), (2, 1024, 2), (16, 176, 7), (1, 4096, 16), (5, 16, 3)):
        lengths = tuple(range(batch))
        case = CacheCase("any", seqlens=lengths, capacity=capacity, seqlen_q=seqlen_q, page_size=page_size)
        launch.decode(*canonical(case, num_splits=2))
    assert {name for name, _ in compiled} == {"zinit_decode_kernel", "zinit_combine_kernel"}
    assert len(set(compiled)) == 3  # decode for one token and for several, and combine


def test_prompt_lengths_share_kernels_by_powers_of_two(compiled):
    for prompt_length in (1, 2, 10, 15, 16):
        attend(Case("any", prompt_length=prompt_length, seqlens_q=(9,)))
    assert len(set(compiled)) == 5


class NothingReadsADevice(TorchDispatchMode):
    """On a GPU these would wait for it, or fail in a graph's capture."""

    SYNCHRONISE = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.SYNCHRONISE, f"{name} reads a tensor on the host"
        if name == "_to_copy":
            assert (kwargs or {}).get("device") is None, "a copy to another device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_decode_reads_nothing_on_the_host(compiled, page_size, seqlen_q):
    """From the public arguments to the launches: what a captured graph may do."""
    case = CacheCase(
        "captured", seqlens=(3, 99), capacity=144, page_size=page_size, rotary_dim=32, table="indexed",
        seqlen_q=seqlen_q,
    )  # fmt: skip
    given = make_cache_arguments(case, torch.float16) | {"softmax_scale": None}
    with NothingReadsADevice():
        launch.decode(*from_cache(**given))
    appended = [] if seqlen_q == 1 else ["zinit_append_kernel"]
    assert [name for name, _ in compiled][: len(appended) + 1] == [*appended, "zinit_decode_kernel"]


def test_the_guard_above_sees_a_read():
    with NothingReadsADevice(), pytest.raises(AssertionError, match="reads a tensor"):
        torch.ones(3).max().item()


CANDIDATES = configs.candidates("forward", 128, 16, 2, 90)


def test_a_first_call_runs_the_written_choice_and_times_nothing(monkeypatch):
    monkeypatch.setattr(tuning, "_milliseconds", lambda config, launch: pytest.fail("timed"))
    launched = []
    tuning.run("key", CANDIDATES, launched.append)
    assert launched == [configs.choose("forward", 128, 16, 2, 90)]


def test_tuning_times_each_candidate_once_a_key_and_keeps_the_fastest(monkeypatch, capsys):
    timed, launched = [], []

    def milliseconds(config, launch):
        timed.append(config)
        return float("inf") if config == CANDIDATES[0] else 5.0 - CANDIDATES.index(config)

    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for key in ("a", "a", "b"):
        tuning.run(key, CANDIDATES, launched.append)
    assert launched == [CANDIDATES[-1]] * 3
    assert timed == [*CANDIDATES, *CANDIDATES]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"zinit: tuned a: {tuple(CANDIDATES[-1])} ")
    assert all(str(tuple(config)) in lines[0] for config in CANDIDATES)


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda config, launch: pytest.fail("timed"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launched = []
    tuning.run("a", CANDIDATES, launched.append)
    assert launched == [CANDIDATES[0]] and not tuning._fastest


def test_a_candidate_that_does_not_fit_loses(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def refuse(function, **_):
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(tuning.testing, "do_bench", refuse)
    assert tuning._milliseconds(CANDIDATES[0], lambda config: None) == float("inf")


def test_tuning_keys_tell_calls_apart(compiled, monkeypatch):
    """By length to a factor of two, dtype, mask and head dimension: a key per kind of call, not per call."""
    keys = []
    monkeypatch.setattr(tuning, "ENABLED", True)
    monkeypatch.setattr(tuning, "run", lambda key, candidates, launch: keys.append(key))
    for change in ({}, {}, {"seqlens_q": (60,)}, {"seqlens_q": (130,)}, {"causal": False}, {"head_dim": 128}):
        attend(Case("any", **{"seqlens_q": (63,)} | change))
    attend(Case("any", seqlens_q=(63,)), torch.bfloat16)
    assert [key[0] for key in keys[:4]] == ["forward", "prompt_gradients", "grad_key_value", "grad_query"]
    assert len(set(keys)) == 4 * 5
    keys.clear()
    for needs in (0b000010, 0b000100, 0b000110):  # gradients of the key, the value, both
        attend(Case("any", seqlens_q=(63,)), needs=needs)
    assert len({key for key in keys if key[0] == "grad_key_value"}) == 3


def test_nvtx_ranges_when_asked_for(monkeypatch):
    opened = []
    monkeypatch.setattr(ranges, "_NVTX", True)
    fake = SimpleNamespace(range=lambda name: opened.append(name) or ranges.nullcontext())
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    with ranges.named("forward"):
        pass
    assert opened == ["zinit.forward"]


@pytest.mark.parametrize(
    ("programs", "key_blocks", "expected"),
    [
        (8, 8, 1),  # 256 keys of one stream of Llama-3-8B: the combination would take longer than it saves
        (8, 32, 8),
        (8, 128, 16),
        (8, 512, 32),  # 33 would fill the multiprocessors, and need one more round of the combination
        (32, 128, 8),
        (256, 512, 1),
        (1, 10**6, 64),
    ],
)
def test_the_keys_are_split_where_that_ends_sooner(programs, key_blocks, expected):
    assert launch.choose_splits(programs, key_blocks, 132, 4) == expected
