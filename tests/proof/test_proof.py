"""`backend="auto"` on a GPU that is not there: which kernels it takes, when it tries them, and what it keeps."""

import json
import os
import signal
import time
import warnings

import pytest
import torch
from forked import in_a_child
from threads import on_threads

from zinit_kernels import (
    explain,
    prompt_attention_,
    proof,
    zero_init_attention,
    zero_init_attention_with_kvcache,
)
from zinit_kernels.proof import store
from zinit_kernels.testing import CacheCase, Case, make_cache_arguments, make_inputs

CASE = Case("call", batch=1, heads_q=2, heads_kv=1, seqlens_q=(9,), head_dim=16)
CACHE_CASE = CacheCase("call", heads_q=2, heads_kv=1, head_dim=16, seqlens=(3,), capacity=16)


def attend(case=CASE, dtype=torch.float32, **overrides):
    inputs = make_inputs(case, dtype)
    for tensor in inputs.tensors.values():
        tensor.requires_grad_(False)
    return inputs.call("auto", return_lse=False, **overrides)[0]


def train():
    return make_inputs(CASE, torch.float32).call("auto", return_lse=False)[0]


def decode(case=CACHE_CASE):
    return zero_init_attention_with_kvcache(**make_cache_arguments(case, torch.float32))


def verdicts(gpu):
    (path,) = store.folder().glob("proof-1/*.json")
    return json.loads(path.read_text())["verdicts"]


def tries(room, length):
    """Calls of a room that were trials: longer than the caller's."""
    return sum(call.query.shape[2] != length for call in room.calls)


def test_the_first_call_tries_the_family_and_the_next_do_not(gpu):
    attend()
    assert (
        len(gpu.triton.calls) == 4 + 1 and not gpu.cuda.calls
    )  # two calls with two seeds, and the caller's own
    attend()
    assert len(gpu.triton.calls) == 4 + 2
    (verdict,) = verdicts(gpu).items()
    assert verdict[0] == "triton.forward float32 16" and verdict[1]["passed"] is True


def test_the_next_process_reads_the_verdict_once(gpu, monkeypatch):
    attend()
    gpu.new_process()
    gpu.triton.calls.clear()
    reads = []
    content = store.Store._content
    monkeypatch.setattr(store.Store, "_content", lambda self: reads.append(1) or content(self))
    attend()
    attend()
    assert len(gpu.triton.calls) == 2 and len(reads) == 1


@pytest.mark.parametrize("name", ["chip", "capability", "driver", "torch", "build"])
def test_another_chip_driver_or_build_is_tried_again(gpu, name):
    attend()
    gpu.new_process()
    gpu.facts[name] += " of another kind"
    attend()
    assert len(gpu.triton.calls) == 2 * (4 + 1)


def test_two_chips_of_a_machine_have_verdicts_of_their_own(gpu):
    other = dict(gpu.facts, chip="Imagined L4")
    first = proof.Subject("triton.forward", torch.float32, 16)
    kinds = {"cuda:0": gpu.facts, "cuda:1": other, "cuda:2": gpu.facts}
    proof.chip.facts = lambda device: dict(kinds[str(device)])  # the fixture's monkeypatch puts it back
    stores = {name: proof.store_of(torch.device(name)) for name in kinds}
    assert stores["cuda:0"] is stores["cuda:2"] is not stores["cuda:1"]
    stores["cuda:0"].end(first.key, proof.Verdict(True, "", "2026-01-01"))
    assert stores["cuda:2"].verdicts and not stores["cuda:1"].verdicts
    assert stores["cuda:0"].path != stores["cuda:1"].path


def test_each_form_of_call_takes_its_own_family_and_backend(gpu):
    train()
    assert set(verdicts(gpu)) == {"triton.forward float32 16", "triton.backward float32 16"}
    decode()
    decode(CacheCase("long", heads_q=2, heads_kv=1, head_dim=16, seqlens=(3,), seqlen_q=17, capacity=32))
    query, _, _, keys, values, gate = (t.detach() for t in make_inputs(CASE, torch.float32).tensors.values())
    out, *tensors = (t.transpose(1, 2) for t in (torch.zeros(1, 2, 9, 16), query, keys, values))
    prompt_attention_(out, *tensors, gate)
    assert set(verdicts(gpu)) >= {f"cuda.{name} float32 16" for name in ("decode", "prefill", "prompt")}
    assert not any(call.query.shape[1] == 1 for call in gpu.triton.calls)


def test_a_dtype_and_a_head_dimension_are_tried_for_themselves(gpu):
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (16, 24):
            attend(Case("call", batch=1, heads_q=2, heads_kv=1, seqlens_q=(9,), head_dim=head_dim), dtype)
    assert len(verdicts(gpu)) == 4


@pytest.mark.parametrize("error", [0.1, float("nan"), RuntimeError("no kernel image is available")])
def test_a_family_that_is_wrong_is_left_out_with_one_warning(gpu, error):
    gpu.triton.error = gpu.cuda.error = error
    with pytest.warns(RuntimeWarning) as caught:
        out = attend()
    expected = make_inputs(CASE, torch.float32).call("reference")[0]
    torch.testing.assert_close(out, expected.detach())
    said = [str(w.message) for w in caught]
    assert len(said) == 2  # Triton's forward, and CUDA's prefill after it
    assert "triton.forward (float32, head_dim 16) failed their trial on Imagined H200" in said[0]
    assert "zinit check --gpu" in said[0]
    # the line in which this package was called: here that of its own testing/cases.py's caller
    assert all(w.filename == __file__ for w in caught)
    tried = len(gpu.triton.calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()
        attend()
    assert len(gpu.triton.calls) == tried, "asked again"


def test_the_cause_of_a_compilers_error_is_said(gpu):
    """Triton's own message is the whole source of the kernel."""
    gpu.cuda.refused = "not here"
    gpu.triton.error = RuntimeError("at 109:11: " + "line of source\n" * 100 + "^ cannot convert")
    gpu.triton.error.__cause__ = TypeError("None is no tensor")
    with pytest.warns(
        RuntimeWarning, match=r"cannot convert \(because of TypeError\('None is no tensor'\)\)"
    ) as caught:
        attend()
    assert len(str(caught[0].message)) < 1000


def test_a_wrong_result_is_remembered_and_an_error_is_not(gpu):
    for error, kept in ((0.1, True), (RuntimeError("no C compiler"), False)):
        proof.forget_all()
        gpu.new_process()
        gpu.triton.error, gpu.cuda.refused = error, "not here"
        with pytest.warns(RuntimeWarning):
            attend()
        gpu.new_process()
        gpu.triton.error = 0.0
        gpu.triton.calls.clear()
        if kept:
            with pytest.warns(RuntimeWarning, match="failed their trial"):
                attend()
            assert not gpu.triton.calls
        else:
            attend()
            assert gpu.triton.calls


def test_a_wrong_backward_leaves_forward_to_calls_without_gradients(gpu, monkeypatch):
    right = gpu.triton.attention

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.view_as(out)

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def attention(call):
        out, lse = right(call)
        return Doubled.apply(out), lse

    monkeypatch.setattr(gpu.triton, "attention", attention)
    gpu.cuda.refused = "it has no backward"
    with pytest.warns(RuntimeWarning, match="triton.backward"):
        train()
    before = len(gpu.triton.calls)
    attend()
    assert len(gpu.triton.calls) == before + 1
    assert {key: v["passed"] for key, v in verdicts(gpu).items()} == {
        "triton.forward float32 16": True,
        "triton.backward float32 16": False,
    }


def test_no_memory_proves_nothing(gpu, monkeypatch):
    gpu.triton.error, gpu.cuda.refused = torch.OutOfMemoryError("CUDA out of memory"), "not here"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()
        attend()  # not at once again
    assert len(gpu.triton.calls) == 1 and not verdicts(gpu)
    gpu.triton.error = 0.0
    monkeypatch.setattr(proof, "SECONDS_TO_RETRY", 0.0)
    proof._retry_at.clear()
    attend()
    assert verdicts(gpu)["triton.forward float32 16"]["passed"]


def test_a_broken_context_ends_the_program_and_is_remembered(gpu):
    gpu.triton.error, gpu.broken = RuntimeError("an illegal memory access was encountered"), True
    with pytest.raises(RuntimeError, match="broke this process's CUDA context.*Start the program again"):
        attend()
    gpu.new_process()
    gpu.broken, gpu.triton.error, gpu.cuda.refused = False, 0.0, "not here"
    gpu.triton.calls.clear()
    with pytest.warns(RuntimeWarning, match="illegal memory access"):
        attend()
    assert not gpu.triton.calls


def test_processes_that_die_in_the_trial_are_counted(gpu):
    """By their mark in the file; after the second nobody tries again."""
    gpu.cuda.refused = "not here"
    kept = proof.store_of(torch.device("cpu"))
    key = proof.Subject("triton.forward", torch.float32, 16).key
    assert kept.begin(key) == 0  # and dies
    gpu.new_process()
    attend()  # tries again, and lives
    assert verdicts(gpu)[key]["passed"]
    proof.forget_all()
    kept = proof.store_of(torch.device("cpu"))
    for _ in range(2):
        kept.begin(key)
    gpu.new_process()
    gpu.triton.calls.clear()
    with pytest.warns(RuntimeWarning, match="two processes did not survive"):
        attend()
    assert not gpu.triton.calls


def test_no_trial_while_a_graph_is_captured(gpu):
    gpu.capturing = True
    gpu.cuda.refused = "not here"
    with pytest.warns(RuntimeWarning, match="Make the call once before the capture"):
        attend()
    assert not gpu.triton.calls
    gpu.capturing = False
    attend()
    gpu.capturing = True
    attend()
    assert len(gpu.triton.calls) == 4 + 2


def test_no_trial_while_torch_compile_traces(gpu):
    gpu.cuda.refused = "not here"
    compiled = torch.compile(
        lambda *t: zero_init_attention(*t, is_causal=True), backend="eager", fullgraph=True
    )
    tensors = [t.detach() for t in make_inputs(CASE, torch.float32).tensors.values()]
    with pytest.warns(RuntimeWarning, match="torch.compile takes PyTorch's attention"):
        compiled(*tensors)
    assert not gpu.triton.calls
    assert proof.read(("triton.forward",), "cpu", "torch.float32", 16)
    attend()
    assert proof.read(("triton.forward",), "cpu", "torch.float32", 16) == ""


def told_by_a_child(gpu, call):
    """The answer of a forked process, which does nothing else: computing after a fork is not safe."""

    def ask():
        gpu.triton.calls.clear()
        return f"{proof.why_not('triton', call)}, {len(gpu.triton.calls)} calls"

    return in_a_child(ask)


def test_no_trial_in_a_forked_child(gpu):
    """What the parent knows holds there too."""
    gpu.cuda.refused = "not here"
    with torch.no_grad():
        call = make_inputs(CASE, torch.float32).canonical()
        assert "not tried now: this process was forked" in told_by_a_child(gpu, call)
        attend()
        assert told_by_a_child(gpu, call) == ", 0 calls"


def test_threads_try_a_family_once(gpu):
    gpu.triton.error = lambda: time.sleep(0.02)
    on_threads(attend)
    assert len(gpu.triton.calls) == 4 + 4


def test_another_process_is_waited_for(gpu, monkeypatch):
    kept = proof.store_of(torch.device("cpu"))
    other = store.Store(gpu.facts)
    with other.locked():
        monkeypatch.setattr(store, "LONGEST_WAIT", 0.1)
        gpu.cuda.refused = "not here"
        attend()
        assert not gpu.triton.calls, "tried twice at once"
        key = proof.Subject("triton.forward", torch.float32, 16).key
        other.end(key, proof.Verdict(True, "", "2026-01-01"))
    proof._retry_at.clear()
    attend()
    assert len(gpu.triton.calls) == 1 and kept.verdicts[key].date == "2026-01-01"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"facts": {}}', "\x00" * 9, '{"verdicts": {"a": 1}}'])
def test_a_file_that_says_nothing_is_written_anew(gpu, content):
    attend()
    path = proof.store_of(torch.device("cpu")).path
    path.write_text(content)
    gpu.new_process()
    attend()
    assert verdicts(gpu) and len(gpu.triton.calls) == 2 * (4 + 1)


def test_a_forged_verdict_of_another_form_is_not_believed(gpu):
    attend()
    path = proof.store_of(torch.device("cpu")).path
    content = json.loads(path.read_text())
    content["verdicts"]["triton.forward float32 16"]["passed"] = "yes"
    path.write_text(json.dumps(content))
    assert not store.Store(gpu.facts).verdicts


def test_without_a_folder_the_verdict_lives_as_long_as_the_process(gpu, monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ZINIT_CACHE", str(blocked / "below"))  # cannot be made, not even by root
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend()
        attend()
    assert len(gpu.triton.calls) == 4 + 2
    assert not proof.store_of(torch.device("cpu")).is_kept()


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"ZINIT_CACHE": "/named", "XDG_CACHE_HOME": "/shared"}, "/named"),
        ({"XDG_CACHE_HOME": "/shared"}, "/shared/zinit_kernels"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/zinit_kernels"),
        ({"HOME": "/home/me"}, "/home/me/.cache/zinit_kernels"),
        ({"HOME": ""}, None),
        ({"HOME": "relative"}, None),
        ({}, None),
    ],
)
def test_the_folder(monkeypatch, environment, expected):
    for name in ("ZINIT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not environment:

        def nobody():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(store.Path, "home", staticmethod(nobody))
    found = store.folder()
    assert (None if found is None else str(found)) == expected


@pytest.mark.parametrize("mode", ["0", "force"])
def test_the_setting(gpu, monkeypatch, mode):
    attend()
    gpu.new_process()
    gpu.triton.calls.clear()
    monkeypatch.setattr(proof, "MODE", mode)
    attend()
    assert len(gpu.triton.calls) == (0 if mode == "0" else 4 + 1)
    attend()
    assert len(gpu.triton.calls) == (0 if mode == "0" else 4 + 2)


def test_an_unknown_setting_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(proof, "MODE", "yes")
    with pytest.raises(ValueError, match="ZINIT_PROOF must be one of 1, 0, force, got 'yes'"):
        attend()


def test_explain_says_which_verdict_it_read_and_tries_nothing(gpu):
    arguments = [t.detach() for t in make_inputs(CASE, torch.float32).tensors.values()]
    found = explain(*arguments, is_causal=True)
    assert not gpu.triton.calls and found.selected == "triton" and found["triton"] == "usable"
    assert "not tried yet on Imagined H200: the first call tries it" in found.proof["triton"]
    attend()
    found = explain(*arguments, is_causal=True)
    assert "triton.forward proven on Imagined H200, 20" in str(found)
    gpu.new_process()
    proof.store_of(torch.device("cpu")).end(
        proof.Subject("triton.forward", torch.float32, 16).key, proof.Verdict(False, "wrong", "2026-01-01")
    )
    found = explain(*arguments, is_causal=True)
    assert found.selected == "cuda" and "failed its trial on Imagined H200, 2026-01-01: wrong" in str(found)


def test_a_named_backend_is_not_asked_for_a_proof(gpu):
    make_inputs(CASE, torch.float32).call("triton")
    assert len(gpu.triton.calls) == 1 and proof.store_of(torch.device("cpu")).verdicts == {}


def test_the_callers_state_is_left_alone(gpu):
    """A trial draws none of the caller's random numbers, and sees neither autocast nor inference mode nor hooks."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    seen = []
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t),
    ):
        proof.prove(proof.Subject("triton.backward", torch.float32, 16), torch.device("cpu"))
    assert verdicts(gpu)["triton.backward float32 16"] == {
        "passed": True, "said": "", "date": verdicts(gpu)["triton.backward float32 16"]["date"],
    }  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before) and not seen


def test_on_a_cpu_nothing_is_asked(monkeypatch):
    """Not even by the slow way, which asks for the backends one by one."""
    from zinit_kernels import dispatch

    def never(*arguments):
        raise AssertionError("the proof was asked on a CPU")

    for name in ("why_not", "describe", "known_why_not", "_store_of"):
        monkeypatch.setattr(proof, name, never)
    monkeypatch.setattr(dispatch, "CPU_IS_FIRST", False)
    attend()
    explain(*make_inputs(CASE, torch.float32).tensors.values(), is_causal=True)
    assert os.environ.get("ZINIT_PROOF") is None


@pytest.mark.parametrize("number", [1, 2])
def test_a_process_killed_while_it_writes_leaves_nothing_for_good(gpu, number):
    """Each of them left a file. The verdicts until then stay, and the next process goes on."""
    kept = store.Store(gpu.facts)
    with kept.locked():
        kept.end("before", store.Verdict(True, "", "2026-11-30"))

    def write():
        real, calls = os.replace, []

        def replace(*paths):
            calls.append(paths)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*paths)

        os.replace = replace
        with kept.locked():
            kept.begin("killed")
            kept.end("killed", store.Verdict(True, "", "2026-11-30"))

    if (child := os.fork()) == 0:
        try:
            write()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(kept.path.parent.glob("*.new"))) == 1
    other = store.Store(gpu.facts)
    with other.locked():
        assert other.begin("killed") == number - 1 and "before" in other.verdicts
    assert not list(kept.path.parent.glob("*.new"))
