"""Projected prompts that are kept: returned while they are what a new projection would give, and never after."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from zinit_kernels.projected import KeptProjections, sources_of, stamp


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(6, 4))
        self.k_proj = nn.Linear(4, 4)


class Projections:
    """What a user of the module does, with a count of the projections."""

    def __init__(self):
        self.kept, self.count = KeptProjections(), 0

    def of(self, layer, settings=None, meanwhile=lambda: None):
        sources = sources_of([layer.prompt], [layer.k_proj])
        found = self.kept.recall(layer, settings, sources)
        if found is None:
            made_of = stamp(settings, sources)
            found = layer.k_proj(layer.prompt)
            self.count += 1
            meanwhile()
            self.kept.keep(layer, made_of, found)
        return found


@pytest.fixture
def made():
    torch.manual_seed(0)
    layer, projections = Layer(), Projections()
    with torch.no_grad():
        first = projections.of(layer)
        assert projections.of(layer) is first and projections.count == 1
    return layer, projections


def step(layer, **options):
    layer.prompt.grad = torch.ones_like(layer.prompt)
    torch.optim.SGD([layer.prompt], 1.0, **options).step()


def set_data(tensor, data):
    tensor.data = data


CHANGES = {
    "in place": lambda layer: layer.prompt.mul_(2),
    "another parameter": lambda layer: setattr(layer, "prompt", nn.Parameter(layer.prompt * 2)),
    "another projection": lambda layer: setattr(layer, "k_proj", nn.Linear(4, 4)),
    "bias in place": lambda layer: layer.k_proj.bias.add_(1),
    "cast": lambda layer: layer.double(),
    "optimizer": step,
    "fused optimizer, which changes no version": lambda layer: step(layer, fused=True),
    "load_state_dict": lambda layer: layer.load_state_dict(Layer().state_dict()),
    # data of the same storage, which is at the same address
    "fewer rows": lambda layer: set_data(layer.prompt, layer.prompt.data[:3]),
    "other strides": lambda layer: set_data(layer.k_proj.weight, layer.k_proj.weight.data.T),
    "another offset": lambda layer: set_data(layer.prompt, layer.prompt.data[1:]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_it_is_projected_anew(made, change):
    layer, projections = made
    with torch.no_grad():
        before = projections.of(layer)
        CHANGES[change](layer)
        found = projections.of(layer)
        assert projections.count == 2 and torch.equal(found, layer.k_proj(layer.prompt))
        assert found.shape != before.shape or not torch.equal(found.float(), before)
        assert projections.of(layer) is found


def test_an_address_that_is_given_again_is_another_tensor(made):
    layer, projections = made
    with torch.no_grad():
        for trial in range(50):
            projections.of(layer)
            layer.to(torch.bfloat16).to(torch.float32)  # the old storage is free, and may be taken at once
            layer.prompt.data = torch.full_like(layer.prompt, float(trial))
            assert torch.equal(projections.of(layer), layer.k_proj(layer.prompt)), trial


def test_memory_that_is_given_again_is_another_storage(made):
    layer, projections = made
    memory = bytearray(4 * layer.prompt.numel())

    def there(scale):
        return torch.frombuffer(memory, dtype=torch.float32).view(6, 4).fill_(scale)

    with torch.no_grad():
        layer.prompt.data = there(1.0)
        projections.of(layer)
        layer.prompt.data = there(
            2.0
        )  # at one address, and with one version: the parameter's, which .data leaves
        assert torch.equal(projections.of(layer), layer.k_proj(layer.prompt))


def test_another_parameter_over_the_same_data_with_as_many_changes(made):
    layer, projections = made
    with torch.no_grad():
        layer.prompt.mul_(1)
        projections.of(layer)
        version, layer.prompt = layer.prompt._version, nn.Parameter(layer.prompt.data)
        layer.prompt.mul_(2)
        assert layer.prompt._version == version
        assert torch.equal(projections.of(layer), layer.k_proj(layer.prompt))


def test_a_change_while_it_was_projected_is_not_kept(made):
    """As an optimizer's in another thread: what was read before is not taken for what is there since."""
    layer, projections = made
    with torch.no_grad():
        layer.prompt.mul_(2)
        projections.of(layer, meanwhile=lambda: step(layer, fused=True))
        assert torch.equal(projections.of(layer), layer.k_proj(layer.prompt)) and projections.count == 3


def test_settings_and_autocast_count(made):
    layer, projections = made
    with torch.no_grad():
        projections.of(layer, settings="other")
        assert projections.count == 2
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert projections.of(layer, settings="other").dtype == dtype
        assert projections.of(layer, settings="other").dtype == torch.float32


def hooked(layer):
    layer.k_proj.register_forward_hook(lambda *_: None)


def hooked_everywhere(layer):
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


def wrapped(layer):
    layer.k_proj.forward = lambda hidden: hidden


def of_another_package(layer):
    layer.k_proj.__class__ = type("Linear", (nn.Linear,), {})


def parametrised(layer):
    nn.utils.parametrizations.weight_norm(layer.k_proj)


UNSEEN = (hooked, hooked_everywhere, wrapped, of_another_package, parametrised)


@pytest.mark.parametrize("change", UNSEEN, ids=[change.__name__ for change in UNSEEN])
def test_what_may_depend_on_more_is_not_kept(made, change):
    layer, projections = made
    handle = change(layer)
    with torch.no_grad():
        for count in (2, 3):
            projections.of(layer)
            assert projections.count == count
    if handle is not None:
        handle.remove()


def test_hooks_that_are_known_to_observe_do_not_matter(made):
    layer, _ = made
    hooked(layer)
    with torch.no_grad():
        assert sources_of([], [layer.k_proj]) is None
        assert len(sources_of([], [layer.k_proj], hooks_observe=True)) == 2


def test_with_gradients_and_in_transforms_nothing_is_kept(made):
    layer, projections = made
    projections.of(layer).sum().backward()
    projections.of(layer).sum().backward()  # a kept graph would have been freed
    assert projections.count == 3
    with torch.no_grad():
        torch.func.vmap(lambda _: projections.of(layer))(torch.ones(2))
        assert projections.count == 4


def test_tensors_of_inference_mode_have_no_version():
    with torch.inference_mode():
        layer, projections = Layer(), Projections()
        for scale in (1, 2):
            assert torch.equal(projections.of(layer), layer.k_proj(layer.prompt))
            layer.prompt.mul_(scale + 1)


def parts_of(tensor):
    """The plain tensors in a subclass; in torchao 0.16 it wraps another subclass."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]


def test_a_subclass_is_what_it_consists_of():
    quantization = pytest.importorskip("torchao.quantization")
    layer, projections = Layer(), Projections()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    assert type(layer.k_proj.weight) is not nn.Parameter
    with torch.no_grad():
        first = projections.of(layer)
        assert projections.of(layer) is first
        for part in parts_of(layer.k_proj.weight):
            part.mul_(2)
        assert not torch.equal(projections.of(layer), first)


def test_copies_begin_empty_and_owners_are_not_kept_alive():
    layer, projections = Layer(), Projections()
    with torch.no_grad():
        projections.of(layer)
    assert len(projections.kept) == 1
    assert len(copy.deepcopy(projections.kept)) == len(pickle.loads(pickle.dumps(projections.kept))) == 0
    del layer
    gc.collect()
    assert len(projections.kept) == 0
