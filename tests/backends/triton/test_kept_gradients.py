"""Kept launches of backward: they are those of a first call, whatever was kept before."""

# ruff: noqa: F811 - a fixture that a test asks for
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from kept_on_gpu import forget, launches, misaligned, numbers, on_gpu, whole  # noqa: F401
from noted_launches import labelled

from zinit_kernels import zero_init_attention
from zinit_kernels.backends import fused
from zinit_kernels.backends.triton import kept, launch
from zinit_kernels.backends.triton.kept_gradients import Gradients


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


ALL = ("query", "key", "value", "prompt_key", "prompt_value", "gate")


def arguments(wanted=(*ALL, "sinks"), **changes):
    """New tensors; those that are wanted require a gradient."""
    copies = {n: t.clone() if torch.is_tensor(t) else t for n, t in (whole() | changes).items()}
    return {n: t.requires_grad_() if n in wanted and t is not None else t for n, t in copies.items()}


def strided(grad):
    """[B, H, T, D] with rows that lie apart."""
    return torch.zeros(*grad.shape[:-1], 2 * grad.shape[-1], dtype=grad.dtype)[..., : grad.shape[-1]]


def turned(grad):
    """Its last stride is not 1: it is copied."""
    return torch.zeros(grad.transpose(2, 3).shape, dtype=grad.dtype).transpose(2, 3)


def replaced(given, out):
    """As FSDP does between forward and backward."""
    given["prompt_key"].data = misaligned(given["prompt_key"].data)


def other_rows(given, out):
    """Of another length between the rows; the address stays a multiple of 16."""
    table = given["prompt_value"]
    table.data = torch.zeros(*table.shape[:3], 96, dtype=table.dtype)[..., : table.shape[3]]


ONE_ROW = {"prompt_key": numbers(1, 2, 10, 64), "prompt_value": numbers(1, 2, 10, 64)}
A_ROW_EACH = {
    "prompt_key": numbers(2, 2, 10, 64),
    "prompt_value": numbers(2, 2, 10, 64),
    "gate": numbers(2, 4, dtype=torch.float32),
}
# name -> what is differentiated: the arguments, the gradients that are wanted, the gradient of the output, what
# happens between forward and backward
BACKWARDS = {
    "the query is its gradient": {"grad": "query"},  # before the base: its launches take one address twice
    "base": {},
    "prompts alone": {"wanted": ("prompt_key", "prompt_value", "gate")},
    "the query alone": {"wanted": ("query",)},
    "the gate alone": {"wanted": ("gate",)},
    "strided gradient": {"grad": strided},
    "turned gradient": {"grad": turned},
    "expanded gradient": {"grad": lambda grad: torch.zeros((), dtype=grad.dtype).expand(grad.shape)},
    "misaligned gradient": {"grad": misaligned},
    "no gradient of out": {"grad": None, "grad_lse": torch.zeros_like},
    "both gradients": {"grad_lse": torch.zeros_like},
    "turned gradient of lse": {"grad_lse": lambda lse: torch.zeros(lse.shape[::-1]).permute(2, 1, 0)},
    "tables with rows": {"changes": ONE_ROW},
    "a row each": {"changes": A_ROW_EACH},
    "gates with rows": {"changes": {"gate": numbers(1, 4, dtype=torch.float32)}},
    "float32 tables": {"changes": {n: t.float() for n, t in ONE_ROW.items()}},
    "sinks": {"changes": {"sinks": numbers(4, dtype=torch.float32)}},
    "sinks without prompts": {"changes": dict.fromkeys(ALL[3:]) | {"sinks": numbers(4, dtype=torch.float32)}},
    "indexed": {"changes": {"prompt_index": torch.tensor([0, -1], dtype=torch.int32)}},
    "another scale": {"changes": {"scale": 0.25}},
    "not causal": {"changes": {"is_causal": False}},
    "replaced table": {"changes": ONE_ROW, "between": replaced},
    "table with other rows": {"changes": ONE_ROW, "between": other_rows},
}  # fmt: skip


def differentiated(
    noted, changes=None, wanted=(*ALL, "sinks"), grad=torch.zeros_like, grad_lse=None, between=None
):
    """What a backward launches and returns."""
    given = arguments(wanted, **(changes or {}))
    outputs = zero_init_attention(**given, return_lse=True)
    if between is not None:
        between(given, outputs[0])
    if grad == "query":
        grad = lambda out: given["query"].detach()  # noqa: E731
    made = [
        None if make is None else make(t.detach()) for make, t in zip((grad, grad_lse), outputs, strict=True)
    ]
    pairs = [(out, g) for out, g in zip(outputs, made, strict=True) if g is not None]
    leaves = [given[name] for name in wanted if given.get(name) is not None]
    noted.clear()
    outs, given_grads = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outs, leaves, given_grads)
    results = [(g.shape, g.stride(), g.dtype) for g in grads]
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    inputs = [t for t in given.values() if torch.is_tensor(t)]
    return labelled(noted, [*inputs, *outputs, *made, *grads]), results


def test_no_backward_is_taken_for_another(on_gpu):
    """Each alone, after the base, and all in turn; in the last turn none goes through Triton that need not."""
    expected = {}
    for name, asked in BACKWARDS.items():
        forget()
        expected[name] = differentiated(on_gpu, **asked)
    assert len({str(outcome) for outcome in expected.values()}) > 15, "they hardly differ"
    forget()
    for turn in range(5):
        for name, asked in BACKWARDS.items():
            by_triton = on_gpu.by_triton
            assert differentiated(on_gpu, **asked) == expected[name], (name, turn)
            if turn == 4 and not name.startswith("turned"):
                assert on_gpu.by_triton == by_triton, f"{name} is not kept"


def test_a_kept_backward_asks_for_no_view(on_gpu, monkeypatch):
    """The operator's way is not taken, which makes views of the tables and of the gate."""
    for _ in range(3):
        expected = differentiated(on_gpu)
    monkeypatch.setattr(fused, "_gradients", None)
    assert differentiated(on_gpu) == expected
    out = zero_init_attention(**arguments())
    assert all(type(edge).__name__ == "AccumulateGrad" for edge, _ in out.grad_fn.next_functions if edge)


def test_copies_that_hooks_bring_are_launched_with(on_gpu):
    """`saved_tensors_hooks` may bring tensors of other strides at other addresses."""
    for _ in range(4):
        differentiated(on_gpu)
    copies = []

    def unpack(tensor):
        copies.append(strided(tensor) if tensor.dim() == 4 else tensor.clone())
        return copies[-1]

    given = arguments()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out = zero_init_attention(**given)
    on_gpu.clear()
    torch.autograd.grad(out, given["query"], torch.zeros_like(out))
    sent = str(list(on_gpu))
    assert all(str(copy.data_ptr()) in sent for copy in copies if copy.dim() == 4)
    assert not any(str(given[name].data_ptr()) in sent for name in ("key", "value", "prompt_key"))


def test_second_derivatives_go_by_the_formula(on_gpu):
    """Of a kept call as of a first one: the launches cannot be differentiated. Nothing is computed, so 0 comes out."""
    for _ in range(4):
        differentiated(on_gpu)
    given = arguments()
    out = zero_init_attention(**given)
    on_gpu.clear()
    leaves = [given[name] for name in ALL]
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    assert not on_gpu and all(
        g.grad_fn is not None and g.shape == t.shape for g, t in zip(grads, leaves, strict=True)
    )
    twice = torch.autograd.grad(sum(g.float().sum() for g in grads), leaves, allow_unused=True)
    assert twice[3] is not None and twice[3].shape == given["prompt_key"].shape


@pytest.mark.parametrize(
    ("seqlen", "head_dim", "prompts"), [(512, 128, 10), (2048, 64, 10), (64, 64, 128), (512, 80, 10)]
)
def test_the_partial_sums_take_no_memory_of_their_own(seqlen, head_dim, prompts, on_gpu):
    """They lie in the query's gradient, where they fit: else 2.7 % more than all results at 32 x 512 tokens."""
    given = arguments(
        query=numbers(4, 4, seqlen, head_dim),
        key=numbers(4, 4, seqlen, head_dim),
        value=numbers(4, 4, seqlen, head_dim),
        prompt_key=numbers(4, prompts, head_dim),
        prompt_value=numbers(4, prompts, head_dim),
    )
    out = zero_init_attention(**given)
    on_gpu.clear()
    grads = torch.autograd.grad(out, [given[name] for name in ALL], torch.zeros_like(out))
    (sums,) = (noted for noted in on_gpu if noted[0] == "zinit_partial_sums_kernel")
    inside = range(grads[0].data_ptr(), grads[0].data_ptr() + grads[0].numel() * 2)
    addresses = [a for a in sums[3] if isinstance(a, int) and a in inside]
    parts = launch.num_parts(-(-seqlen // 64), 16)
    needed = 4 * 16 * parts * (2 * prompts * head_dim + 1)
    assert len(addresses) == (3 if needed < len(inside) else 0)
    sizes = [4 * 16 * parts * prompts * head_dim] * 2 + [4 * 16 * parts]
    ends = [address + size for address, size in zip(addresses, sizes, strict=False)]
    assert all(end <= first for end, first in zip(ends, [*addresses[1:], inside.stop], strict=False))


@pytest.mark.parametrize("state", ["dispatch mode", "device"])
def test_who_has_to_see_the_launches_sees_them(state, on_gpu, monkeypatch):
    """A mode that began after the forward, and another device."""
    for _ in range(4):
        differentiated(on_gpu)
    given = arguments()
    out = zero_init_attention(**given)
    grad, leaves = torch.zeros_like(out), [given[name] for name in ALL]
    asked = []
    gradients = fused._gradients
    monkeypatch.setattr(fused, "_gradients", lambda *given: asked.append(1) or gradients(*given))
    if state == "device":
        monkeypatch.setattr(kept, "is_current", lambda index: False)
    with Watching() if state == "dispatch mode" else contextlib.nullcontext():
        torch.autograd.grad(out, leaves, grad)
    assert asked


def test_which_gradients_are_wanted_is_part_of_the_key(on_gpu):
    """It follows from the forward's key today, since autograd says which inputs require a gradient."""
    saved = (
        numbers(2, 4, 33, 64),
        None,
        numbers(2, 4, 33, 64),
        numbers(2, 4, 33),
        *[numbers(8)] * 3,
        *[None] * 5,
    )
    first, second = (Gradients(()).find(saved, wanted)[1] for wanted in ((True, False), (True, True)))
    assert first is not None and first != second


def test_an_input_changed_in_place_is_noticed(on_gpu):
    for _ in range(4):
        differentiated(on_gpu)
    given = arguments()
    out = zero_init_attention(**given)
    with torch.no_grad():
        given["gate"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
