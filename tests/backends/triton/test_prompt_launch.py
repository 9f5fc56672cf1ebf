"""The launches of the prompt term alone: a kept one sends its kernel what Triton itself would have sent."""

import pytest
import torch

pytest.importorskip("triton")

from noted_launches import labelled  # noqa: E402

from zinit_kernels.backends.triton import kept, prompt_launch  # noqa: E402
from zinit_kernels.testing import Case, make_inputs  # noqa: E402

CASES = [
    Case("grouped", heads_q=4, heads_kv=2, seqlens_q=(75,), head_dim=64),
    Case("indexed", table="indexed", batch=3, seqlens_q=(33,), head_dim=24, gate="per_row"),
    Case("identity", seqlens_q=(9,), head_dim=128, gate_activation="identity", prompt_length=33),
]


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    monkeypatch.setattr(prompt_launch, "arch_of", lambda tensor: 90)


def call_of(case):
    call = make_inputs(case, torch.bfloat16).canonical()
    return type(call)(*(t.detach() if isinstance(t, torch.Tensor) else t for t in call))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "way", ["in_place", "into_another", "subtracts", "grad_query", "grad_query_into_another"]
)
def test_a_kept_launch_is_the_same(way, case, launches):
    """In place and into another tensor are different launches, of which neither stands for the other."""
    call = call_of(case)
    is_gradient, has_target = way.startswith("grad_query"), "another" in way or way == "subtracts"
    noted = []
    for other in (False, True, False):  # another way is kept between
        source, target, grad_out = (torch.zeros_like(call.query) for _ in range(3))
        target = target if has_target != other else None
        launches.clear()
        by_triton = launches.by_triton
        for _ in range(3):  # Triton's binder, the recorded launch, and again
            if is_gradient:
                found = prompt_launch.add_grad_query(call, grad_out, source, target)
            else:
                found = prompt_launch.add_prompts(call, source, target, subtracts=way == "subtracts")
            assert found is (source if target is None else target)
        assert launches.by_triton - by_triton == (0 if len(noted) == 2 else 1)
        inputs = [source if target is None else target, source, grad_out, *call[:8]]
        first, *others = labelled(launches, inputs)
        assert len(others) == 2 and all(one == first for one in others)
        noted.append(first)
    assert noted[0] == noted[2] != noted[1]
    assert len(kept._plans) == 2 and all(plan is not None for plan in kept._plans.values())
