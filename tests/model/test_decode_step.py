"""A whole decoding step as one graph: no break, no wait for a device, and the tokens of eager decoding."""

import pytest
import torch
from tiny_models import hf_directory
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.adapter import LlamaAdapter
from model.config import AdapterConfig
from model.llama import KVCache
from model.loading import load_base

TOKENS = torch.tensor([[5], [9]])


@pytest.fixture(params=[None, "int8"])
def model(tmp_path, request):
    hf_directory(tmp_path)
    return load_base(tmp_path, torch.float32, quantise=request.param).freeze()


def adapter_of(model):
    torch.manual_seed(5)
    return LlamaAdapter(model.config, AdapterConfig(gate_init="random")).requires_grad_(False)


def greedy_step(model, adapter, cache):
    def step(tokens):
        hidden = model.hidden_states(tokens, adapter, cache=cache)
        return model.logits(hidden[:, -1]).argmax(-1, keepdim=True)

    return step


def decode(step, steps=4):
    tokens, made = TOKENS, []
    with torch.no_grad():
        for _ in range(steps):
            tokens = step(tokens)
            made.append(tokens)
    return torch.cat(made, 1).tolist()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_is_one_graph(model, backend):
    """fullgraph raises at a break. A graph's tokens are those of eager decoding."""
    adapter = adapter_of(model)
    caches = [KVCache(model.config, 2, 16, model.dtype) for _ in range(2)]
    graph = torch.compile(
        greedy_step(model, adapter, caches[0]), fullgraph=True, backend=backend, dynamic=False
    )
    assert decode(graph) == decode(greedy_step(model, adapter, caches[1]))
    # with packed weights, an activation near the middle of two 16-bit numbers may be rounded either way
    atol = 1e-4 if type(model.layers[0].mlp.up_proj) is nn.Linear else 2e-3
    torch.testing.assert_close(caches[0].keys, caches[1].keys, rtol=1e-3, atol=atol)


class Calls(TorchDispatchMode):
    """Counts the operators of a step, without views; one that waits for the device fails."""

    WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item"}
    VIEWS = {"view", "_unsafe_view", "t", "transpose", "unsqueeze", "select", "slice", "expand", "permute", "detach",
             "alias", "split", "as_strided", "unbind", "_reshape_alias", "squeeze", "reshape"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        if name not in self.VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.native
def test_a_step_on_a_cpu_is_a_few_calls(model):
    """All layers are one: the embedding, the layers, the lengths, the output product, the choice."""
    adapter = adapter_of(model)
    cache = KVCache(model.config, 2, 16, model.dtype)
    step = greedy_step(model, adapter, cache)
    with torch.no_grad():
        step(TOKENS)
        with Calls() as calls:
            step(TOKENS)
    assert calls.names.count("decode_layers_cpu") == 1 and calls.names.count("linear_cpu") == 1
    assert len(calls.names) <= 8, calls.names
