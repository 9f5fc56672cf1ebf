"""zinit tune on a machine that is not there: what it times and keeps, and what auto takes then."""

import json

import pytest
import torch
from fake_gpu import gpu  # noqa: F401 (fixture)

from zinit_kernels import (
    dispatch,
    explain,
    proof,
    tune,
    zero_init_attention,
    zero_init_attention_with_kvcache,
)
from zinit_kernels.backends import reference
from zinit_kernels.console import InputError
from zinit_kernels.proof import chip, shape_classes, store

DEVICE = torch.device("cpu")
CLASSES = list(proof.classes(torch.float32, 16))


@pytest.fixture
def machine(gpu, monkeypatch):  # noqa: F811
    """The imagined GPU with small classes; `speed`: backend -> milliseconds of every call, or what timing it raises."""
    monkeypatch.setattr(tune, "gpus", lambda: [DEVICE])
    for name, value in {"_TOKENS": 64, "_SEQUENCES": 2, "_HEADS_Q": 2, "_HEADS_KV": 1, "_PROMPTS": 2}.items():
        monkeypatch.setattr(shape_classes, name, value)
    monkeypatch.setattr(
        shape_classes, "_LENGTHS", (("short", 8, 8), ("medium", 32, 16), ("long", 1 << 62, 64))
    )
    monkeypatch.setattr(shape_classes, "_CAPACITIES", (("short", 32, 16), ("long", 1 << 62, 64)))
    monkeypatch.setattr(
        shape_classes, "_NEW", (("one token", 1, 1), ("few tokens", 4, 3), ("a chunk", 1 << 62, 6))
    )
    gpu.speed = {"triton": 2.0, "cuda": 3.0, "composed": 4.0, "hybrid": 5.0}
    gpu.timed = []

    def one_call(shape_class, given, backend):
        gpu.timed.append((shape_class.key, backend))
        made(shape_class, given, backend)

    def milliseconds(device, run):
        run()
        speed = gpu.speed[gpu.timed[-1][1]]
        if isinstance(speed, BaseException):
            raise speed
        return speed(gpu.timed[-1][0]) if callable(speed) else speed

    made = tune.make_one_call
    monkeypatch.setattr(tune, "make_one_call", one_call)
    monkeypatch.setattr(chip, "milliseconds", milliseconds)
    # a device that computes like the CPU, and whose calls are kept apart from those of other backends
    monkeypatch.setattr(dispatch.BACKENDS["composed"], "attention", reference.attention)
    monkeypatch.setattr(dispatch.BACKENDS["composed"], "attention_with_cache", reference.attention_with_cache)
    return gpu


def run():
    return tune.main(["--head-dim", "16", "--dtype", "float32"])


def attend(length=8, heads=2, **overrides):
    tensors = {
        "query": torch.zeros(1, heads, length, 16),
        **{name: torch.zeros(1, 1, length, 16) for name in ("key", "value")},
        **{name: torch.zeros(1, 1, 2, 16) for name in ("prompt_key", "prompt_value")},
        "gate": torch.zeros(heads),
        "is_causal": True,
    }
    return tensors | overrides


def decode(capacity=16, tokens=1, **overrides):
    tensors = {
        "q": torch.zeros(1, tokens, 2, 16),
        **{name: torch.zeros(1, capacity, 1, 16) for name in ("k_cache", "v_cache")},
        **{name: torch.zeros(1, tokens, 1, 16) for name in ("k", "v")},
        **{name: torch.zeros(1, 2, 1, 16) for name in ("prompt_k", "prompt_v")},
        "gate": torch.zeros(2),
        "cache_seqlens": torch.zeros(1, dtype=torch.int32),
        "causal": True,
    }
    return tensors | overrides


def selected(given):
    return explain(**given).selected


def kept():
    (path,) = store.folder().glob("proof-1/*.json")
    return json.loads(path.read_text())["times"]


def test_every_class_is_timed_by_a_call_of_that_class(machine):
    for shape_class in CLASSES:
        call = tune.call_of(shape_class, proof.timed_arguments(shape_class, DEVICE))
        assert proof.class_of(call) == shape_class


def test_all_that_can_run_is_timed_and_kept(machine, capsys):
    assert run() == 0
    expected = {c.key: {"triton": 2.0, "cuda": 3.0, "composed": 4.0} for c in CLASSES}
    for key in expected:
        if not key.startswith("cache"):
            expected[key]["hybrid"] = 5.0
    assert set(machine.timed) == {(key, backend) for key, times in expected.items() for backend in times}
    assert kept() == expected
    out = capsys.readouterr().out
    assert all(c.key in out for c in CLASSES) and f"kept in {proof.store_of(DEVICE).path}" in out
    assert proof.store_of(DEVICE).verdicts  # the families were tried before


def test_auto_takes_the_fastest_of_the_class(machine):
    assert selected(attend()) == "triton" and selected(decode()) == "cuda"
    machine.speed["composed"] = lambda key: 1.0 if "short" in key else 9.0
    run()
    assert selected(attend(length=8)) == "composed" and selected(attend(length=9)) == "triton"
    assert selected(decode(capacity=32)) == "composed" and selected(decode(capacity=33)) == "triton"
    before = len(machine.triton.calls)
    zero_init_attention(**attend(length=8))
    assert len(machine.triton.calls) == before
    zero_init_attention(**attend(length=9))
    assert len(machine.triton.calls) == before + 1
    zero_init_attention_with_kvcache(**decode(capacity=33))
    assert len(machine.triton.calls) == before + 2


def test_hybrid_is_taken_where_it_was_measured_to_be_faster_and_nowhere_else(machine):
    """The vendor's attention with our prompts: no written order has it, whatever failed."""
    machine.speed["hybrid"] = lambda key: 1.0 if "long" in key else 1.99
    machine.triton.refused = machine.cuda.refused = "no"
    assert selected(attend(length=33)) == "composed"
    machine.triton.refused = machine.cuda.refused = ""
    assert selected(attend(length=33)) == "triton" and not machine.hybrid.calls
    assert explain(**attend()).proof["hybrid"].startswith("auto takes it only where `zinit tune`")
    run()
    assert "hybrid.forward proven on Imagined H200" in explain(**attend()).proof["hybrid"]
    assert "1.99 ms in zinit tune" in explain(**attend()).proof["hybrid"]
    assert selected(attend(length=33)) == "hybrid" and selected(decode(capacity=33)) == "triton"
    assert selected(attend(length=32)) == "triton"  # less than 5 % faster
    machine.triton.refused = "no"
    assert selected(attend(length=32)) == "cuda"
    zero_init_attention(**attend(length=33))
    assert machine.hybrid.calls[-1].query.shape[2] == 33
    assert {subject for subject in proof.store_of(DEVICE).verdicts if subject.startswith("hybrid")} == {
        "hybrid.forward float32 16", "hybrid.backward float32 16",
    }  # fmt: skip


def test_hybrid_is_left_out_where_its_trial_failed(machine):
    machine.speed["hybrid"] = 1.0
    machine.hybrid.error = 0.5
    with pytest.warns(RuntimeWarning, match="hybrid.forward .* failed their trial"):
        run()
    assert all("hybrid" not in times for times in kept().values())
    assert selected(attend(length=33)) == "triton"
    machine.hybrid.error = 0.0


def test_a_slower_one_of_two_that_were_timed_is_asked_last_or_not():
    times = {"triton": 2.0, "composed": 1.0, "hybrid": 1.5}
    written, if_faster = ("triton", "cuda", "composed"), ("hybrid",)
    assert proof.fastest_first(times, written, if_faster) == ("composed", "hybrid", "triton", "cuda")
    assert proof.fastest_first(times | {"hybrid": 1.95}, written, if_faster) == ("composed", "triton", "cuda")
    assert proof.fastest_first({"hybrid": 1.0}, written, if_faster) == written
    assert proof.fastest_first({"triton": 2.0, "hybrid": 1.95}, written, if_faster) == written


def test_the_next_process_reads_the_times_and_another_chip_does_not(machine):
    machine.speed["composed"] = 1.0
    run()
    machine.new_process()
    assert selected(attend()) == "composed"
    assert "1 ms in zinit tune" in explain(**attend()).proof["composed"]
    machine.facts["driver"] = "581.0"
    machine.new_process()
    assert selected(attend()) == "triton" and "composed" not in explain(**attend()).proof


def test_a_small_gain_changes_nothing(machine):
    machine.speed["composed"] = 1.95
    run()
    assert selected(attend()) == "triton"


def test_a_training_step_has_classes_of_its_own(machine):
    machine.speed["composed"] = lambda key: 1.0 if key.startswith("training") else 9.0
    run()
    assert selected(attend()) == "triton"
    assert selected(attend(gate=torch.zeros(2, requires_grad=True))) == "composed"


@pytest.mark.parametrize(
    "given",
    [
        attend(softcap=3.0),
        attend(sinks=torch.zeros(2)),
        attend(window_size=(3, 0)),
        attend(attn_mask=torch.ones(1, 8, dtype=torch.bool)),
        attend(query=torch.zeros(1, 2, 8, 24), key=torch.zeros(1, 1, 8, 24), value=torch.zeros(1, 1, 8, 24))
        | {name: torch.zeros(1, 1, 2, 24) for name in ("prompt_key", "prompt_value")},
        decode(window_size=(3, 0)),
        decode(softcap=3.0),
        decode(sinks=torch.zeros(2)),
        decode(cache_leftpad=torch.zeros(1, dtype=torch.int32)),
        decode(block_table=torch.zeros(1, 1, dtype=torch.int32)),
    ],
    ids=lambda given: ", ".join(given.keys() - attend().keys() - decode().keys()) or "head_dim",
)
def test_what_is_not_timed_keeps_the_written_order(given, machine):
    machine.speed["composed"] = 1.0
    before = selected(given)
    assert before in ("triton", "cuda")
    run()
    assert selected(given) == before


def test_a_family_that_failed_its_trial_is_not_timed(machine, capsys):
    machine.triton.error = 0.5
    machine.speed["triton"] = 0.001
    with pytest.warns(RuntimeWarning, match="failed their trial"):
        run()
    assert all("triton" not in times for times in kept().values())
    assert "triton: triton.forward failed its trial" in capsys.readouterr().out
    assert selected(attend()) == "cuda"


def test_want_of_memory_leaves_a_backend_without_a_time(machine, capsys):
    machine.speed["triton"] = torch.OutOfMemoryError("CUDA out of memory")
    run()
    assert kept()[CLASSES[0].key] == {"cuda": 3.0, "composed": 4.0, "hybrid": 5.0}
    assert "triton: not enough memory on the device" in capsys.readouterr().out


def test_other_errors_are_raised(machine):
    machine.speed["triton"] = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        run()


def test_a_damaged_file_counts_as_empty(machine):
    machine.speed["composed"] = 1.0
    run()
    (path,) = store.folder().glob("proof-1/*.json")
    for times in ([], {"a": 1}, {"a": {"composed": "1"}}, {"a": {"composed": -1.0}}, {"a": {"composed": 1}}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"times": times}))
        machine.new_process()
        assert not proof.store_of(DEVICE).times and not proof.store_of(DEVICE).verdicts


def test_a_file_of_verdicts_alone_is_read(machine):
    run()
    (path,) = store.folder().glob("proof-1/*.json")
    content = json.loads(path.read_text())
    del content["times"]
    path.write_text(json.dumps(content))
    machine.new_process()
    assert proof.store_of(DEVICE).verdicts and selected(attend()) == "triton"


def test_a_trial_keeps_the_times_that_another_process_wrote(machine):
    """Both write the whole file."""
    zero_init_attention(**attend())
    other = store.Store(machine.facts)
    other.keep_times("a class", {"composed": 1.0})
    proof.prove(proof.Subject("triton.forward", torch.float32, 32), DEVICE)
    assert kept() == {"a class": {"composed": 1.0}}


def test_forget_removes_the_times(machine):
    machine.speed["composed"] = 1.0
    run()
    assert proof.forget_all() == 1
    assert selected(attend()) == "triton"


def test_the_choice_of_kept_calls_ends_with_new_times(machine):
    before = proof.generation
    run()
    assert proof.generation > before


def test_zinit_proof_0_reads_no_times(machine, monkeypatch):
    machine.speed["composed"] = 1.0
    run()
    monkeypatch.setattr(proof, "MODE", "0")
    assert proof.ordered(tune.call_of(CLASSES[0], attend()), ("triton", "composed")) == ("triton", "composed")
    with pytest.raises(InputError, match="ZINIT_PROOF=0"):
        run()


def test_fake_tensors_ask_for_no_chip(machine, monkeypatch):
    monkeypatch.setattr(chip, "facts", lambda device: pytest.fail("there is no such device"))
    with torch._subclasses.FakeTensorMode():
        call = tune.call_of(CLASSES[0], proof.timed_arguments(CLASSES[0], DEVICE))
        assert proof.ordered(call, ("triton", "composed")) == ("triton", "composed")


@pytest.mark.parametrize(
    "arguments, said",
    [([], "needs an NVIDIA GPU"), (["--head-dim", "0"], "1 to 256"), (["--head-dim", "257"], "1 to 256")],
)
def test_faults_are_one_sentence(arguments, said):
    with pytest.raises(InputError, match=said):
        tune.main(arguments)


def test_a_long_wait_is_one_sentence(machine, monkeypatch):
    def wait(*_):
        raise proof.Busy

    monkeypatch.setattr(proof, "keep_times", wait)
    with pytest.raises(InputError, match="another process"):
        run()
