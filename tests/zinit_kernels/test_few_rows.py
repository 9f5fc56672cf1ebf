"""Whether the layers of a decoding step are launched as few: by trial and time, on a machine that is not there."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from fake_gpu import gpu  # noqa: F401 (fixture)

from zinit_kernels import few_rows, proof
from zinit_kernels.backends import few_rows as kernels
from zinit_kernels.proof import chip, store

CPU = torch.device("cpu")
C, HEADS, KV, F = 12, 16, 8, 20


@pytest.fixture
def machine(gpu, monkeypatch):  # noqa: F811
    """speed: way -> milliseconds; timed: what was timed."""
    gpu.speed, gpu.timed = {"triton": 1.0, "composed": 2.0}, []

    def milliseconds(device, run):
        before = len(gpu.few_rows.products)
        run()
        name = "triton" if len(gpu.few_rows.products) > before else "composed"
        gpu.timed.append(name)
        return gpu.speed[name]

    monkeypatch.setattr(chip, "milliseconds", milliseconds)
    monkeypatch.setattr(chip, "repeatable", lambda device, run: run)
    return gpu


def weights(random, intermediate=F):
    attention, mlp = [(C,), (HEADS, C), (KV, C), (KV, C), (C, HEADS)], (intermediate, C)
    shapes = [*attention, (C,), mlp, mlp, (C, intermediate)]
    return few_rows.Weights(*(torch.randn(shape, generator=random) for shape in shapes))


def layers(count=2):
    random = torch.Generator().manual_seed(0)
    return few_rows.Layers([weights(random) for _ in range(count)], 1e-5)


def ask(found, num_rows=1, backend="auto"):
    with torch.no_grad():
        return found.why_not(torch.zeros(num_rows, C), backend)


def test_a_layer_is_what_it_is_composed_of(gpu):  # noqa: F811
    random = torch.Generator().manual_seed(1)
    x, attended = torch.randn(3, C, generator=random), torch.randn(3, HEADS, generator=random)
    found = layers(1)
    one = found.weights[0]
    seen = []
    out = found.run(x, 0, lambda *projected: seen.append(projected) or attended)

    def norm(y, weight):
        return torch.nn.functional.rms_norm(y, (C,), weight, 1e-5)

    for ours, weight in zip(seen[0], (one.query, one.key, one.value), strict=True):
        torch.testing.assert_close(ours, norm(x, one.input_norm) @ weight.T)
    middle = x + attended @ one.output.T
    normed = norm(middle, one.post_norm)
    right = middle + (torch.nn.functional.silu(normed @ one.gate.T) * (normed @ one.up.T)) @ one.down.T
    torch.testing.assert_close(out, right)


def test_it_is_tried_and_timed_once_and_then_taken(machine):
    found = layers()
    assert ask(found) == "" and sorted(machine.timed) == ["composed", "triton"]
    tried = len(machine.few_rows.products)
    assert ask(found) == ask(layers()) == "" and len(machine.few_rows.products) == tried
    (path,) = store.folder().glob("proof-1/*.json")
    kept = json.loads(path.read_text())
    assert kept["verdicts"]["triton.few_rows float32"]["passed"]
    assert kept["times"] == {"few_rows float32 12, 16, 8, 8, 20, 1 rows": machine.speed}
    machine.new_process()
    assert ask(layers()) == "" and len(machine.few_rows.products) == tried, "the file was not read"


def test_each_number_of_rows_is_timed_up_to_a_factor_of_two(machine):
    found = layers()
    for num_rows in (1, 2, 3, 4, 5, 8, 31, 32):
        assert ask(found, num_rows) == ""
    assert len(machine.timed) == 2 * 5  # 1, 2, 4, 8 and 32
    assert "1 to 32 rows, got 33" in ask(found, 33)


@pytest.mark.parametrize("ours, taken", [(1.89, True), (1.95, False), (3.0, False)])
def test_it_is_taken_only_where_it_is_faster_by_five_percent(machine, ours, taken):
    machine.speed["triton"] = ours
    found = layers()
    assert (ask(found) == "") == taken
    assert taken or "less time" in ask(found)
    assert ask(found, backend="triton") == ""


def test_a_wrong_one_is_left_out_with_one_warning(machine):
    machine.few_rows.error = 0.5
    with pytest.warns(
        RuntimeWarning, match="triton.few_rows .*takes PyTorch's linear layers where"
    ) as caught:
        assert "failed its trial" in ask(layers())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "failed its trial" in ask(layers())
    assert not machine.timed


def test_nothing_is_tried_or_timed_in_a_capture(machine):
    machine.capturing = True
    with pytest.warns(RuntimeWarning, match="the graph holds PyTorch's linear layers"):
        assert "captured" in ask(layers())
    proof.prove(proof.Subject(proof.FEW_ROWS, torch.float32, None), CPU)
    found = layers()
    assert "captured" in ask(found) and not machine.timed
    machine.capturing = False
    assert ask(found) == ""


def test_without_proof_it_is_left_out(machine, monkeypatch):
    monkeypatch.setattr(proof, "MODE", "0")
    assert "ZINIT_PROOF=0" in ask(layers()) and not machine.few_rows.products


def test_what_no_kernel_takes(machine):
    random = torch.Generator().manual_seed(0)
    uneven = few_rows.Layers([weights(random), weights(random, F + 1)], 1e-5)
    assert "different sizes" in ask(uneven, backend="triton")
    machine.few_rows.refused = "sm_75"
    assert ask(layers()) == "sm_75"
    found, x = layers(), torch.zeros(1, C)
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert "a mode" in found.why_not(x, "triton")


def test_the_device_decides():
    from zinit_kernels.backends import triton

    expected = triton.UNAVAILABLE or ("" if triton.INTERPRETED else "the tensors are on cpu")
    assert kernels.why_not(CPU, torch.float32) == expected
    assert triton.UNAVAILABLE or "got torch.float64" in kernels.why_not(CPU, torch.float64)


def test_auto_takes_no_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda device, dtype: "")
    assert "NVIDIA" in ask(layers())
    assert ask(layers(), backend="triton") == ""
