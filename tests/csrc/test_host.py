"""_C_host, the part that needs neither torch nor CUDA: what the CUDA launcher decides, and the build's facts."""

import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from random import Random

import kernel_facts
import pytest
import torch
from repository import ROOT

from zinit_kernels import checks

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aIfE' for 'sm_80'
ptxas info    : Function properties for _Z1aIfE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 976 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1aIfE' for 'sm_90a'
ptxas info    : Function properties for _Z1aIfE
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem, 976 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("host")
    (folder / "ptxas.log").write_text(LOG)
    kernel_facts.main(str(folder / "kernel_facts.inc"), str(folder / "ptxas.log"))
    library = folder / f"_C_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = [f"-I{path}" for path in (folder, pybind11.get_include(), sysconfig.get_path("include"))]
    facts = json.dumps(json.dumps({"cuda": "13.0", "archs": ["sm_80"]}))
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-fvisibility=hidden", f"-DZINIT_BUILD_FACTS={facts}"]
    subprocess.run(["g++", *flags, *include, ROOT / "csrc" / "host.cpp", "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_C_host", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_ptxas_said_is_kept(host):
    assert json.loads(host.build_facts) == {"cuda": "13.0", "archs": ["sm_80"]}
    assert json.loads(host.kernel_facts) == [
        {"kernel": "_Z1aIfE", "arch": "80", "registers": 40, "stack": 0, "spilled": 0, "shared": 0},
        {"kernel": "_Z1aIfE", "arch": "90a", "registers": 255, "stack": 16, "spilled": 12, "shared": 512},
    ]


def test_it_needs_neither_torch_nor_cuda(host):
    program = f"import sys; sys.path.insert(0, {str(Path(host.__file__).parent)!r}); import _C_host as h"
    program += "; print('torch' in sys.modules, h.choose_num_splits(132, 1, 32, 1, 4096, 0))"
    ran = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "8"]


SIZES = ("num_sequences", "num_heads_kv", "row_blocks", "capacity", "page_size")


@pytest.mark.parametrize(
    "sizes, splits",
    [
        ((1, 32, 1, 1024, 0), 8),  # one stream, 32 heads: 256 blocks for 264 places
        ((1, 32, 1, 16384, 0), 8),
        ((1, 8, 1, 1024, 0), 16),  # 128 blocks of 64 keys, each with a multiprocessor to itself
        ((1, 8, 1, 4096, 0), 32),  # 256 blocks of two rounds; 30 splits of 144 keys would take three
        ((1, 8, 1, 16384, 0), 32),
        ((1, 8, 1, 65536, 16), 32),
        ((1, 8, 1, 1024, 128), 8),  # no split shorter than a page
        ((32, 32, 1, 4096, 0), 1),  # 1024 blocks fill the chip
        ((64, 8, 1, 8192, 16), 1),
        ((1, 1, 1, 100, 0), 1),  # nothing to split
        ((1, 1, 1, 1 << 20, 0), 128),  # as many as there may be
        ((1, 1, 1, 1024, 512), 2),  # no split shorter than a page
    ],
)
def test_num_splits_on_132_multiprocessors(host, sizes, splits):
    assert host.choose_num_splits(132, **dict(zip(SIZES, sizes, strict=True))) == splits


@pytest.mark.parametrize("capacity", [1024, 4096, 16384, 65536])
def test_no_other_number_of_splits_is_clearly_better(host, capacity):
    """In rounds of 64 keys, one after the other on the busiest place of the chip."""

    def rounds(blocks, splits):
        return -(-blocks * splits // 264) * -(-capacity // splits // 64)

    for blocks in range(1, 300):
        splits = host.choose_num_splits(132, blocks, 1, 1, capacity, 16)
        assert 1 <= splits <= min(128, capacity // 64)
        least = min(rounds(blocks, s) for s in range(1, min(128, capacity // 128) + 1))
        assert rounds(blocks, splits) <= max(1.2 * least, least + 4), (blocks, splits, least)


@pytest.mark.parametrize(
    "given, tensor_cores, rows, row_blocks",
    [
        ({"num_heads_q": 32, "num_heads_kv": 32, "seqlen_q": 1}, False, 1, 1),
        ({"num_heads_q": 32, "num_heads_kv": 16, "seqlen_q": 1}, False, 4, 1),
        ({"num_heads_q": 32, "num_heads_kv": 8, "seqlen_q": 1}, True, 16, 1),
        ({"num_heads_q": 32, "num_heads_kv": 8, "seqlen_q": 5}, True, 16, 2),
        ({"num_heads_q": 32, "num_heads_kv": 8, "seqlen_q": 5, "half_precision": False}, False, 4, 5),
        ({"num_heads_q": 8, "num_heads_kv": 8, "seqlen_q": 0}, False, 4, 1),
    ],
)
def test_query_rows_are_packed(host, given, tensor_cores, rows, row_blocks):
    plan = host.plan_decode(multiprocessors=132, num_sequences=1, capacity=4096, **given)
    assert (plan["tensor_cores"], plan["rows_per_block"], plan["row_blocks"]) == (
        tensor_cores,
        rows,
        row_blocks,
    )


def test_the_shared_memory_of_a_block(host):
    sizes = {
        "multiprocessors": 132,
        "num_sequences": 1,
        "num_heads_q": 32,
        "num_heads_kv": 8,
        "capacity": 4096,
    }
    found = [
        host.plan_decode(**sizes, seqlen_q=1, prompt_length=P, seqlen_new=new)["shared_bytes"]
        for P, new in ((0, 0), (10, 0), (10, 1), (128, 16))
    ]
    # 16 rows of queries in halves, of results in floats, and 5 states; then scores, and new keys and values
    rows = 16 * (256 + 64) + 16 * (128 + 8) * 4 + 5 * 16 * 8
    assert found == [rows + 64 * P + 512 * new for P, new in ((0, 0), (10, 0), (10, 1), (128, 16))]
    assert max(found) <= 99 << 10


def test_a_given_number_of_splits_is_kept_within_bounds(host):
    sizes = {"multiprocessors": 132, "num_sequences": 1, "num_heads_q": 8, "num_heads_kv": 8, "seqlen_q": 1}
    assert host.plan_decode(**sizes, capacity=4096, num_splits=7)["num_splits"] == 7
    assert host.plan_decode(**sizes, capacity=4096, num_splits=1000)["num_splits"] == 128
    with pytest.raises(ValueError, match="must be a multiple"):
        host.plan_decode(**sizes | {"num_heads_kv": 3}, capacity=4096)


BACKWARD = {"num_sequences": 1, "num_heads_q": 8, "num_heads_kv": 8, "seqlen_q": 512, "seqlen_k": 512}


def test_backward_on_a_cpu_has_pieces_for_many_threads(host):
    for heads, sequences in ((1, 1), (8, 1), (32, 1), (8, 4)):
        sizes = BACKWARD | {"num_heads_q": heads, "num_heads_kv": heads, "num_sequences": sequences}
        plan = host.plan_cpu_backward(**sizes, threads=64)
        passes = plan["blocks"]  # of a key head
        assert plan["splits"] == min(passes, -(-32 // (heads * sequences)))
        assert plan["block_queries"] == 64 or heads * sequences * plan["blocks"] >= 32


@pytest.mark.parametrize(
    "given, threads, in_turn",
    [
        ({}, 1, True),  # 8 pairs of a sequence and a head occupy 1, 2, 4 and 8 threads
        ({}, 8, True),
        ({}, 6, False),  # and 6 threads to two thirds
        ({"packed": True}, 8, False),  # of unknown lengths
        ({"packed": True}, 2, True),  # but there are four for each thread
        ({"seqlen_q": 64, "num_heads_kv": 8}, 6, True),  # one block of queries: nothing to split
    ],
)
def test_backward_on_a_cpu_splits_where_threads_would_be_idle(host, given, threads, in_turn):
    plan = host.plan_cpu_backward(**BACKWARD | given, threads=threads)
    assert plan["in_turn"] == in_turn
    assert (plan["key_floats"] == 0) == in_turn
    assert in_turn or plan["key_floats"] == 8 * plan["splits"] * 2 * 512 * 64


def test_backward_splits_do_not_depend_on_the_threads(host):
    """Only whether one unit takes them all does: what is summed, and in which order, stays."""
    found = [host.plan_cpu_backward(**BACKWARD, threads=threads) for threads in range(1, 40)]
    assert len({(plan["splits"], plan["blocks"], plan["block_queries"]) for plan in found}) == 1


def test_no_heads_and_no_sequences_need_no_workspace(host):
    for given in ({"num_heads_q": 0}, {"num_sequences": 0}, {"seqlen_q": 0}):
        plan = host.plan_cpu_backward(**BACKWARD | given, prompt_length=3, threads=2)
        assert plan["splits"] == 1 and plan["gate_floats"] == 0


DECODE = {"num_sequences": 1, "num_heads_q": 8, "num_heads_kv": 8, "longest": 4096}


@pytest.mark.parametrize(
    "given, threads, heads_per_item, splits",
    [
        # a token-major cache is read in runs of 4 KB, where it has as many heads
        ({}, 1, 8, 1),
        ({}, 2, 8, 2),
        # 8 items occupy both threads
        ({"token_major": False}, 2, 1, 1),
        # 24 items for 3 threads; with 8 or 16 items one thread would idle in the last round
        ({"token_major": False}, 3, 1, 3),
        ({"num_sequences": 64}, 16, 8, 1),
        ({"longest": 300}, 2, 8, 1),  # no split is shorter than 256 keys
        ({"num_splits": 7}, 2, 8, 7),
        ({"num_splits": 7, "longest": 3}, 2, 8, 3),
    ],
)
def test_decode_on_a_cpu(host, given, threads, heads_per_item, splits):
    plan = host.plan_cpu_decode(**DECODE | given, threads=threads)
    assert (plan["heads_per_item"], plan["splits"]) == (heads_per_item, splits)
    floats = (DECODE | given)["num_sequences"] * 8 * splits * (64 + 2)
    assert plan["partial_floats"] == (0 if splits == 1 else floats)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_for_shared_memory_is_exact(host, seed):
    """In C++ and in Python, against all addresses of small random views."""
    random = Random(seed)

    def view(buffer):
        sizes = [random.randint(1, 3) for _ in range(4)]
        return buffer.as_strided(sizes, [random.randint(0, 12) for _ in range(4)], random.randint(0, 60))

    for _ in range(300):
        buffer = torch.zeros(200, dtype=torch.uint8)
        views = [view(buffer), view(buffer)]
        numbers = torch.arange(200)
        a, b = (numbers.as_strided(v.shape, v.stride(), v.storage_offset()).flatten().tolist() for v in views)
        expected = not set(a).isdisjoint(b)
        assert checks.share_memory(*views) == expected
        described = [part for v in views for part in (v.storage_offset(), list(v.shape), list(v.stride()))]
        assert host.share_memory(*described) == expected
