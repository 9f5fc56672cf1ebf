"""The trials of `zinit_kernels.proof` with the kernels themselves: interpreted Triton, emulated CUDA.

Right kernels pass, and a planted fault is found. Elsewhere the proof is tested with stand-ins for the kernels.
"""

import pytest
import torch

from zinit_kernels.backends import cuda as cuda_room
from zinit_kernels.call import Call
from zinit_kernels.proof import Subject, trial

CPU = torch.device("cpu")


@pytest.fixture
def narrow(monkeypatch):
    """Of attention calls one sequence and two query heads, and one seed: the interpreter is slow."""
    every = trial.calls

    def first(family, dtype, head_dim, seed):
        for call in every(family, dtype, head_dim, seed):
            if isinstance(call, Call):
                call = call._replace(
                    query=call.query[:1, :2],
                    **{name: getattr(call, name)[:1, :1] for name in ("key", "value")},
                    **{name: getattr(call, name)[:, :1] for name in ("prompt_key", "prompt_value")},
                    gate=call.gate[:, :2].contiguous(),
                    prompt_index=None if call.prompt_index is None else call.prompt_index[:1],
                    key_bias=None if call.key_bias is None else call.key_bias[:1],
                )
            yield call

    monkeypatch.setattr(trial, "SEEDS", (0,))
    monkeypatch.setattr(trial, "calls", first)


CUDA = [("cuda.decode", 80), ("cuda.prefill", 64), ("cuda.prompt", 96)]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "family", ["triton.forward", "triton.backward", "triton.decode", "hybrid.forward", "hybrid.backward"]
)
def test_interpreted_kernels_pass(family, narrow):
    trial.run(Subject(family, torch.float32, 32), CPU)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "family, kernel", [("forward", "_sign_and_size"), ("decode", "_sign_and_size"), ("backward", "_cap")]
)
def test_a_fault_of_interpreted_kernels_is_found(family, kernel, narrow, monkeypatch):
    """A scale that is off by 1 %; in the backward alone, a soft cap of 3 that nobody asked for."""
    from zinit_kernels.backends.triton import launch

    right = getattr(launch, kernel)
    if kernel == "_cap":
        calls = []

        def spoilt(scale, softcap):  # forward's call comes first
            calls.append(1)
            return right(scale, 3.0 if len(calls) % 2 == 0 else softcap)
    else:

        def spoilt(scale):
            sign, size = right(scale)
            return sign, 1.01 * size

    monkeypatch.setattr(launch, kernel, spoilt)
    with pytest.raises(AssertionError, match="call 0, seed 0: (out|gradient of query): error"):
        trial.run(Subject(f"triton.{family}", torch.float32, 32), CPU)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "part, family, said",
    [
        ("forward", "forward", "out"),
        ("backward", "backward", "gradient of query"),
        ("add_prompts", "forward", "out"),
        ("add_grad_query", "backward", "gradient of query"),
    ],
)
def test_a_fault_of_either_half_of_hybrid_is_found(part, family, said, narrow, monkeypatch):
    """The vendor's scale is off by 1 %, or the prompts' by 5 %, in forward or in backward."""
    from zinit_kernels.backends.hybrid import vendor
    from zinit_kernels.backends.triton import prompt_launch

    if part in ("forward", "backward"):
        right = getattr(vendor.CPU, part)
        spoilt = vendor.CPU._replace(**{part: lambda *given: right(*given[:-1], 1.01 * given[-1])})
        monkeypatch.setattr(vendor, "CPU", spoilt)
    else:
        right = getattr(prompt_launch, part)
        monkeypatch.setattr(
            prompt_launch, part, lambda call, *rest, **named: right(spoil(call), *rest, **named)
        )

        def spoil(call):
            return call._replace(scale=1.05 * call.scale)

    with pytest.raises(AssertionError, match=f"call 0, seed 0: {said}: error"):
        trial.run(Subject(f"hybrid.{family}", torch.float32, 32), CPU)


@pytest.mark.parametrize("family, head_dim", CUDA)
def test_emulated_kernels_pass(family, head_dim, cuda):
    trial.run(Subject(family, torch.bfloat16, head_dim), CPU)


@pytest.mark.parametrize("family, head_dim", CUDA)
def test_a_fault_of_emulated_kernels_is_found(family, head_dim, cuda, monkeypatch):
    """A window of 30 keys that nobody asked for, or gates without their tanh."""
    for name in ("attention", "attention_with_cache", "add_prompt_branch"):
        right = getattr(cuda_room, name)
        changed = {"window_left": 30} if name != "add_prompt_branch" else {"tanh_gate": False}
        monkeypatch.setattr(
            cuda_room, name, lambda call, right=right, changed=changed: right(call._replace(**changed))
        )
    with pytest.raises(AssertionError, match="call [01], seed 0: out: error"):
        trial.run(Subject(family, torch.bfloat16, head_dim), CPU)
