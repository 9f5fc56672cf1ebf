"""The net itself is tested: each planted bug must be caught, by a wrong value or an error, in one of the orders.

All bugs are in one copy of the sources, and a number says which of them is there: a compilation for each took minutes.
"""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import compile_host as simt
import pytest
import torch
from emulator import Emulator
from orders import ORDERS

from zinit_kernels.testing import CacheCase, Case, check_cache_case, check_case

BARRIER = "__syncthreads();"
GROUPED = CacheCase(
    "grouped", heads_q=8, heads_kv=2, seqlens=(0, 17, 100), seqlen_q=2, num_splits=2, page_size=16
)
TWO_ROW_BLOCKS = CacheCase("two_row_blocks", heads_q=20, heads_kv=1, seqlens=(40,))
WITHOUT_KEYS = CacheCase("without_keys", append=False, seqlens=(0, 5), num_splits=2)
ALONE = CacheCase("alone", heads_q=2, heads_kv=2, seqlens=(0, 17, 100), num_splits=2, rotary_dim=32)
CAUSAL = Case("causal", batch=1, heads_q=4, heads_kv=2, seqlens_q=(200,))
WINDOW = Case("window", batch=1, heads_q=1, heads_kv=1, seqlens_q=(150,), window=(70, -1))
PADDED = Case("padded", heads_q=1, heads_kv=1, mask="padding")
PROMPTS = Case("prompts", batch=1, heads_q=2, heads_kv=1, seqlens_q=(40,), prompt_length=128)
CHUNK = CacheCase("chunk", heads_q=2, heads_kv=1, seqlens=(0, 40), seqlen_q=17, page_size=16, rotary_dim=32)
CAPPED = Case("capped", batch=1, heads_q=2, heads_kv=1, seqlens_q=(40,), softcap=0.7)
CAPPED_ROWS = CacheCase("capped", heads_q=8, heads_kv=2, seqlens=(0, 17, 100), num_splits=2, softcap=0.7)
CAPPED_ROW = CacheCase("capped_alone", heads_q=2, heads_kv=2, seqlens=(0, 17, 100), softcap=0.7)
HIDDEN = CacheCase("hidden", heads_q=8, heads_kv=2, seqlens=(9, 17, 100), num_splits=2, leftpad=(0, 17, 40))
HIDDEN_CHUNK = CacheCase("hidden_chunk", heads_q=2, heads_kv=1, seqlens=(0, 40), seqlen_q=17, leftpad=(0, 9))
# all queries see the same keys: no row is computed again
SEE_ALL = CacheCase("see_all", heads_q=2, heads_kv=1, seqlens=(0, 40), seqlen_q=17, causal=False)
SEE_ALL_PAGED = CacheCase(
    "see_all_paged", heads_q=2, heads_kv=1, seqlens=(0, 40), seqlen_q=17, causal=False, page_size=16
)

SINKS = CacheCase("sinks", heads_q=2, heads_kv=1, seqlens=(0, 40), num_splits=2, sinks=True)


class Bug(NamedTuple):
    file: str
    correct: str  # in the text around it, where @ stands
    wrong: str
    around: str = "@"
    case: Case | CacheCase = GROUPED


def prefill(file: str, correct: str, wrong: str, around: str = "@", case: Case | CacheCase = CAUSAL) -> Bug:
    return Bug(f"prefill/{file}", correct, wrong, around, case)


def tiles(file: str, correct: str, wrong: str, around: str = "@", case: Case | CacheCase = CAUSAL) -> Bug:
    return Bug(f"tiles/{file}", correct, wrong, around, case)


BUGS = {
    "no_barrier_before_states_are_read": Bug("decode/finish.cuh", BARRIER, "", "kWarps * ROWS * 2;\n  @"),
    "no_barrier_after_prompt_scores": Bug("decode/finish.cuh", BARRIER, "", "  });\n  @\n  for (int row"),
    "no_barrier_after_staging": Bug("decode/tensor_cores.cuh", BARRIER, "", "shared);\n  @"),
    "no_barrier_between_turns": Bug("decode/finish.cuh", BARRIER, "", "  @\n  }\n  if (w.seqlen_q > 1)"),
    "one_key_too_many": Bug("decode/work.cuh", "1", "2", "position + w.window_right + @, int64_t"),
    "wrong_head_of_the_group": Bug(
        "decode/stage.cuh", "kv_head * w.group + (first + row) % w.group", "(first + row) % w.group * 2 + kv_head"
    ),
    "gate_without_its_activation": Bug("prompt_table.cuh", "tanhf(raw)", "raw", "w.tanh_gate ? @ : raw"),
    "sink_of_another_head": Bug("row_end.cuh", "head", "0", "w.sinks.data[@]", SINKS),
    "sink_as_an_exponent_of_2": Bug("row_end.cuh", "kLog2E", "1.f", "* @ : -INFINITY", SINKS),
    "sinks_added_to_no_sum": Bug("row_end.cuh", "fast_exp2(sink - top)", "0.f", "keys * l + @", SINKS),
    "lse_without_its_sink": Bug("row_end.cuh", "sum", "(keys * l)", "logf(@)", SINKS),
    "combined_without_a_wait": Bug("decode/combine.cuh", "grid_dependency_synchronize();", ""),
    "one_split_for_all": Bug("decode/combine.cuh", "head_dim", "0", "+ d, @, w.splits"),
    "splits_without_keys_are_read": Bug(
        "decode/combine.cuh", "state[i].y == 0.f", "false", "= @ ? 0.f", WITHOUT_KEYS
    ),
    "new_keys_from_the_cache": Bug("decode/work.cuh", "key >= s.length", "false", "if (@) return", TWO_ROW_BLOCKS),
    "slot_of_another_page": Bug("decode/work.cuh", "max(page_of(w, s.index, page), 0)", "0"),
    "appended_in_no_split": Bug("decode/work.cuh", "w.splits - 1", "w.splits", "split == @"),
    "values_from_the_keys": Bug("decode/stage.cuh", "value", "key", "shared.new_values[i] = @;", ALONE),
    "keys_not_rotated": Bug("decode/stage.cuh", "position", "0", "share.kv_head, token), d, @);", ALONE),
    "shuffle_in_a_branch": Bug(
        "decode/cuda_cores.cuh", "", "if (first + lane_group >= share.end) continue;",
        "    float p[ROWS][kUnroll];@\n", ALONE,
    ),
    "values_of_other_keys": Bug(
        "decode/tensor_cores.cuh", "quarter * 2 + i % 2 + i / 2 * 8", "quarter * 4 + i", "tile.value(@)"
    ),
    "dimensions_out_of_order": Bug("decode/tensor_cores.cuh", "j % 2 ? 0x7632 : 0x5410", "j % 2 ? 0x5410 : 0x7632"),
    "no_shared_memory": Bug("decode/launch.cuh", "shared_bytes", "0", "dim3(kThreads), @, stream"),
    "tile_read_before_all_have_copied": prefill("kernel.cuh", BARRIER, "", "@  // this tile"),
    "tile_read_before_it_lands": prefill("kernel.cuh", "wait_for_copies<0>();", "", "++tile) {\n    @"),
    "prompts_read_before_they_land": prefill("kernel.cuh", "wait_for_copies<0>();", "", "}\n  @\n  __sync"),
    "next_tile_over_this_one": prefill("stage.cuh", "kStages", "1", "tile % @ * 2"),
    "not_committed": prefill("kernel.cuh", "commit_copies();", "", "    @\n  };"),
    "one_causal_key_too_many": prefill("work.cuh", "1", "2", "w.reach_right + @"),
    "one_window_key_too_few": prefill("work.cuh", "w.reach_left", "w.reach_left + 1", "offset - @", WINDOW),
    "cut_tile_taken_as_whole": prefill("kernel.cuh", "first + Shape::kKeys", "first", "@ <= seen_by_all_to"),
    "wrong_key_head": prefill("work.cuh", "b.head / w.group", "b.head % 2"),
    "not_rescaled": prefill("kernel.cuh", "multiply_rows<Shape>(acc, alpha);", ""),
    "not_divided": prefill("kernel.cuh", "multiply_rows<Shape>(acc, inverse);", ""),
    "lse_without_its_sum": Bug("row_end.cuh", "logf(l)", "0.f", "kLn2 + @", CAUSAL),
    "masked_keys_are_read": prefill("stage.cuh", "w.key_bias.data[block.batch * w.seqlen_k + key] != -INFINITY", "true",
                                    "wanted && @;", PADDED),
    "keys_behind_the_end_are_read": prefill("stage.cuh", "first + row < end", "true", "= @;", SEE_ALL),
    "keys_behind_the_end_of_a_page": prefill("stage.cuh", "key < end", "true", "= @;", SEE_ALL_PAGED),
    "rows_of_a_tile_in_steps_of_one": prefill("stage.cuh", "kRows", "1", "value += @ *"),
    "keys_of_another_page": prefill("work.cuh", "max(page_of(w, sequence, page), 0)", "0", "@", CHUNK),
    "queries_not_rotated_by_token": prefill("stage.cuh", "token", "0", "(w.rotary.by_token ? @ : 0)", CHUNK),
    "appended_elsewhere": prefill("append.cuh", "sequence.length + token", "token", "position = @", CHUNK),
    "values_not_transposed": tiles(
        "tile.cuh", "load_matrices_transposed(b, value + n * 8 * Shape::kStride + d);",
        "load_matrices(b, value + n * 8 * Shape::kStride + d);",
    ),
    "rows_written_before_all_are_staged": tiles("tile.cuh", "__syncwarp();", "", "@\n  constexpr int kVectors"),
    "maximum_of_one_lane": tiles("softmax.cuh", "row_max(most)", "most"),
    "more_prompts_than_there_are": tiles("prompts.cuh", "exists", "true", "= @ ?"),
    "prompts_without_their_sum": tiles("prompts.cuh", "row_sum(softmax.l[t][half])", "1.f", "branch.weight / @"),
    "prompts_over_those_in_use": tiles("prompts.cuh", BARRIER, "", "(int first) {\n    @", PROMPTS),
    "prompts_used_before_all_are_there": tiles("prompts.cuh", BARRIER, "", "    @\n  };\n  float", PROMPTS),
    "cap_of_another_size": Bug("softcap.cuh", "softcap * kLog2E", "softcap", "cap = @;", CAPPED),
    "no_cap_in_prefill": prefill("kernel.cuh", "w.softcap > 0.f", "false", "if (@) cap_tile", CAPPED),
    "scaled_and_capped": prefill("kernel.cuh", "w.softcap > 0.f", "false", "scale = @ ?", CAPPED),
    "no_cap_on_prompts": tiles("prompts.cuh", "w.softcap > 0.f", "false", "if (@) cap_tile", CAPPED),
    "no_cap_on_tensor_cores": Bug("decode/tensor_cores.cuh", "w.softcap > 0.f", "false", "if (@) {", CAPPED_ROWS),
    "no_cap_on_cuda_cores": Bug("decode/cuda_cores.cuh", "w.softcap > 0.f", "false", "if (@) {", CAPPED_ROW),
    "no_cap_on_prompts_of_a_cache": Bug(
        "decode/finish.cuh", "cap_exponent(w, score * (w.scale * kLog2E))", "score * (w.scale * kLog2E)", "= @;",
        CAPPED_ROW,
    ),
    "hidden_slots_are_seen": Bug("decode/work.cuh", "s.hidden", "0", "begin = @;", HIDDEN),
    "hidden_slots_are_seen_in_prefill": prefill("work.cuh", "s.hidden", "0", "b.hidden = @,", HIDDEN_CHUNK),
    "first_prompts_only": tiles("prompts.cuh", "first > 0", "false", "if (@) restage", PROMPTS),
}  # fmt: skip


def choice(number: int, bug: Bug) -> str:
    """The correct text, or the wrong one while the bug of that number is asked for."""
    asked = f"simt_planted == {number}"
    if bug.correct and ";" not in bug.correct:
        return f"({asked} ? {bug.wrong} : {bug.correct})"
    return f"if ({asked}) {{ {bug.wrong} }} else {{ {bug.correct} }}"


def plant(texts: Iterable[tuple[Bug, str]], folder: Path) -> None:
    """The kernels' sources into `folder`, with a text in place of each bug's correct one."""
    shutil.copytree(simt.ROOT / "csrc" / "cuda", folder / "csrc" / "cuda")
    shutil.copy(simt.ROOT / "csrc" / "params.h", folder / "csrc")
    for bug, text in texts:
        file = folder / "csrc" / "cuda" / bug.file
        before, after = bug.around.split("@")
        source, whole = file.read_text(), before + bug.correct + after
        found = source.count(whole)
        assert found == 1, f"{whole!r} stands {found} times in {bug.file}: plant the bug elsewhere"
        file.write_text(source.replace(whole, before + text + after))


def edit(file: Path, pattern: str, text: str) -> None:
    edited, found = re.subn(pattern, lambda match: text, file.read_text(), count=1, flags=re.DOTALL)
    assert found, f"{pattern!r} is not in {file.name}"
    file.write_text(edited)


def compile_planted(folder: Path) -> Path:
    """The bfloat16 kernels with all bugs, for head_dim 64 alone, beside the other files as they are."""
    library = simt.build("kernels.so", simt.ALL)
    plant([(bug, choice(number, bug)) for number, bug in enumerate(BUGS.values(), 1)], folder)
    cuda = folder / "csrc" / "cuda"
    edit(cuda / "device.cuh", "#pragma once\n", '#pragma once\nextern "C" int simt_planted;\n')
    only_64 = "if (head_dim == 64) return f.template operator()<64>();\n"
    edit(cuda / "elements.cuh", r"switch \(head_dim\) \{.*?\n  \}\n", only_64)
    (folder / "planted.cpp").write_text('extern "C" { int simt_planted = 0; }\n')
    sources = [
        cuda / "decode" / "decode_bf16.cu",
        cuda / "prefill" / "prefill_bf16.cu",
        folder / "planted.cpp",
    ]

    def compile_one(source: Path) -> Path:
        command = ["g++", *simt.CFLAGS, "-Wno-error", "-O1", *simt.includes(), "-x", "c++", "-c", source]
        subprocess.run([*command, "-o", source.with_suffix(".o")], check=True, capture_output=True)
        return source.with_suffix(".o")

    with ThreadPoolExecutor(2) as pool:
        planted = list(pool.map(compile_one, sources))
    others = [library.parent / f"{source}.o" for source in [*simt.ALL, *simt.RUNTIME] if "bf16" not in source]
    subprocess.run(["g++", "-shared", *planted, *others, "-o", folder / "planted.so"], check=True)
    return folder / "planted.so"


@pytest.fixture(scope="module")
def planted(emulator, tmp_path_factory):
    return Emulator(compile_planted(tmp_path_factory.mktemp("planted")))


@pytest.fixture
def ask(planted, register):
    """ask(name): that bug, and no other, is there."""
    register(planted)
    number = ctypes.c_int.in_dll(planted.library, "simt_planted")
    yield lambda name: setattr(number, "value", list(BUGS).index(name) + 1)
    number.value = 0


def caught(case: Case | CacheCase, order: tuple[str, str], monkeypatch) -> bool:
    monkeypatch.setenv("SIMT_SCHEDULE", order[0])
    monkeypatch.setenv("SIMT_COPIES", order[1])
    try:
        if isinstance(case, CacheCase):
            check_cache_case(case, torch.bfloat16, "cuda")
        else:
            with torch.no_grad():
                check_case(case, torch.bfloat16, "cuda", backward=False)
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("name", BUGS)
def test_is_caught(ask, monkeypatch, name):
    ask(name)
    assert any(caught(BUGS[name].case, order, monkeypatch) for order in ORDERS)


@pytest.mark.parametrize("case", sorted({bug.case for bug in BUGS.values()}, key=str), ids=str)
def test_without_a_bug_nothing_is_caught(planted, register, monkeypatch, case):
    register(planted)
    assert not any(caught(case, order, monkeypatch) for order in ORDERS)


SANITIZED = {  # caught whatever the values are
    "thread": Bug("decode/finish.cuh", BARRIER, "", "  });\n  @\n  for (int row"),
    "address": Bug("decode/launch.cuh", "shared_bytes", "shared_bytes - 16", "dim3(kThreads), @, stream"),
}


@pytest.mark.parametrize("sanitizer", SANITIZED)
def test_the_sanitizers_catch_theirs(tmp_path, sanitizer):
    if reason := simt.why_not_here():
        pytest.skip(reason)
    plant([(SANITIZED[sanitizer], SANITIZED[sanitizer].wrong)], tmp_path)
    (tmp_path / simt.HERE).mkdir(parents=True)
    driver = shutil.copy(simt.ROOT / simt.HERE / "check_decode.cpp", tmp_path / simt.HERE)
    flags, defines = simt.SANITIZERS[sanitizer]
    objects = []
    for source, own in ((driver, flags), *((simt.ROOT / name, ["-O2"]) for name in simt.RUNTIME)):
        objects.append(tmp_path / f"{Path(source).stem}.o")
        command = [
            "g++",
            *simt.CFLAGS,
            *own,
            *defines,
            *simt.includes(),
            "-x",
            "c++",
            "-c",
            source,
            "-o",
            objects[-1],
        ]
        subprocess.run(command, check=True)
    subprocess.run(["g++", *flags, *objects, "-o", tmp_path / "check"], check=True)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    ran = subprocess.run([tmp_path / "check"], capture_output=True, text=True, env=environment)
    assert ran.returncode != 0
    assert {"thread": "data race", "address": "heap-buffer-overflow"}[sanitizer] in ran.stderr
