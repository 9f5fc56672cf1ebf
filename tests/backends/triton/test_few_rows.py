"""Linear layers of a few rows, and the layers of a decoding step that are made of them, under Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.adapter import LlamaAdapter
from model.config import LlamaConfig
from model.device_layers import DeviceLayers
from model.llama import KVCache, Llama
from model.sampling import generate
from zinit_kernels import few_rows as chosen
from zinit_kernels import proof
from zinit_kernels.backends import few_rows
from zinit_kernels.proof import trial
from zinit_kernels.testing.tolerance import assert_within_eager_error

pytest.importorskip("triton")

from zinit_kernels.backends.triton.kept import Recorder  # noqa: E402

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=67, hidden_size=48, intermediate_size=70, num_layers=3, num_heads_q=4, num_heads_kv=2, head_dim=16,
    max_seq_len=96, eos_ids=(5,),
)  # fmt: skip
PROMPTS = [[3, 9], [7]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Llama(CONFIG).initialise(0.2).freeze()
    for layer in made.layers:
        nn.init.uniform_(layer.input_layernorm.weight, 0.5, 1.5)
        nn.init.uniform_(layer.post_attention_layernorm.weight, 0.5, 1.5)
    return made


@pytest.fixture(scope="module")
def adapter():
    made = LlamaAdapter(CONFIG, generator=torch.Generator().manual_seed(1))
    nn.init.constant_(made.gates, 0.7)
    return made


def noted(monkeypatch, name="run"):
    """The calls of a method of `Layers`."""
    calls, method = [], getattr(chosen.Layers, name)
    monkeypatch.setattr(chosen.Layers, name, lambda *given: calls.append(given) or method(*given))
    return calls


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 32])
@pytest.mark.parametrize(
    "columns, sizes", [(128, (64, 32, 32)), (131, (67, 33, 35)), (5, (1, 2, 3))], ids=str
)
def test_it_is_the_formula(dtype, num_rows, columns, sizes):
    random = torch.Generator().manual_seed(num_rows)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    x, norm, weights = normal(num_rows, columns), normal(columns), [normal(size, columns) for size in sizes]
    for product in (
        few_rows.Product(x, (*weights,), norm, 0.2),
        few_rows.Product(x, (*weights[:2],)),
        few_rows.Product(x, (weights[0], normal(sizes[0], columns)), norm, 0.2, gated=True),
        few_rows.Product(x, (weights[1],), residual=normal(num_rows, sizes[1])),
    ):
        given = product.mapped(lambda tensor: trial._between_nan(tensor, CPU))
        exact = few_rows.composed(product.mapped(torch.Tensor.double))
        for ours, near, right in zip(
            few_rows.launched(given), few_rows.composed(product), exact, strict=True
        ):
            assert_within_eager_error("out", ours, near, right, dtype)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_trial_passes(dtype, monkeypatch):
    monkeypatch.setattr(trial, "SEEDS", (0,))
    trial.run(proof.Subject(proof.FEW_ROWS, dtype, None), CPU)


def _swapped(arguments):
    if arguments["GATED"]:
        weight, second = arguments["weight_ptr"], arguments["second_ptr"]
        arguments |= {"weight_ptr": second, "second_ptr": weight}


def _exchanged(arguments):
    if arguments["third_ptr"] is not None:
        arguments |= {"second_ptr": arguments["third_ptr"], "third_ptr": arguments["second_ptr"]}


def _without_mask(arguments):
    arguments["WHOLE"] = True


def _without_eps(arguments):
    arguments["eps"] = 0.0


def _without_norm(arguments):
    arguments["norm_ptr"] = None


def _residual_of_another_row(arguments):
    if arguments["residual_ptr"] is not None:
        arguments["residual_ptr"] = arguments["residual_ptr"].roll(1, 0)


def _one_row_less(arguments):
    arguments["num_rows"] -= 1


def _one_column_less(arguments):
    arguments["columns"] -= 1


def _shorter_weight(arguments):
    arguments["size"] -= 1


BUGS = [
    _swapped, _exchanged, _without_mask, _without_eps, _without_norm, _residual_of_another_row, _one_row_less,
    _one_column_less, _shorter_weight,
]  # fmt: skip


@pytest.mark.interpreted
@pytest.mark.parametrize("plant", BUGS, ids=lambda bug: bug.__name__[1:])
def test_the_trial_finds_a_planted_bug(plant, monkeypatch):
    launch = Recorder.launch

    def spoilt(self, kernel, programs, arguments, options):
        plant(arguments)
        launch(self, kernel, programs, arguments, options)

    monkeypatch.setattr(Recorder, "launch", spoilt)
    with pytest.raises(AssertionError, match="product .*out"):
        trial.run(proof.Subject(proof.FEW_ROWS, torch.float32, None), CPU)


@pytest.mark.interpreted
def test_the_tokens_are_those_of_the_layers_one_by_one(model, adapter, monkeypatch):
    options = {"max_new_tokens": 4, "temperature": 0, "eos_ids": ()}
    expected = generate(model.set_backend("reference"), PROMPTS, adapter, **options)
    calls = noted(monkeypatch)
    assert generate(model.set_backend("triton"), PROMPTS, adapter, **options) == expected
    assert len(calls) == CONFIG.num_layers * 3 and {len(x) for _, x, *_ in calls} == {len(PROMPTS)}


@pytest.mark.interpreted
@pytest.mark.parametrize("tokens", [1, 5])
@torch.no_grad()
def test_hidden_states_and_cache_are_those_of_the_layers_one_by_one(model, adapter, tokens, monkeypatch):
    random = torch.Generator().manual_seed(tokens)
    chunks = [torch.randint(67, (3, size), generator=random) for size in (4, tokens)]
    calls, found = noted(monkeypatch), []
    for backend in ("reference", "triton"):
        model.set_backend(backend)
        cache = KVCache(CONFIG, 3, 16, torch.float32)
        hidden = [model.hidden_states(chunk, adapter, cache=cache) for chunk in chunks]
        found.append((*hidden, cache.keys, cache.values))
        assert cache.lengths.tolist() == [4 + tokens] * 3
    assert len(calls) == 2 * CONFIG.num_layers
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


# allocations, a question about dtypes, and attention, whose own launches are counted
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::promote_types", "zinit::decode_triton")


class Operators(TorchDispatchMode):
    """Counts the operators that launch something on a GPU: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        schema = operator._schema
        is_view = not schema.is_mutable and any(one.alias_info is not None for one in schema.returns)
        if not is_view and schema.name not in _NO_LAUNCH:
            self.names.append(schema.name)
        return operator(*arguments, **named or {})


@pytest.mark.interpreted
@pytest.mark.parametrize("splits", [1, 2])
@torch.no_grad()
def test_a_layer_is_at_most_six_launches(splits, monkeypatch):
    """5, and 6 where the cache is split; before there were 29."""
    from zinit_kernels.backends.triton import launch

    monkeypatch.setattr(chosen, "is_plain_state", lambda: True)  # the counter is a mode
    monkeypatch.setattr(launch, "choose_splits", lambda *sizes: splits)
    launched = []
    monkeypatch.setattr(Recorder, "launch", lambda self, kernel, *given: launched.append(kernel.__name__))
    counts = []
    for num_layers in (2, 5):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        model = Llama(config).initialise(0.2).freeze().set_backend("triton")
        adapter = LlamaAdapter(config, generator=torch.Generator().manual_seed(1))
        cache = KVCache(config, 2, 16, torch.float32)
        tokens = torch.tensor([[3], [4]])
        model.hidden_states(tokens, adapter, cache=cache)  # the prompts are projected once
        launched.clear()
        with Operators() as operators:
            model.hidden_states(tokens, adapter, cache=cache)
        counts.append(len(launched) + len(operators.names))
    assert counts[1] - counts[0] == 3 * (4 + splits), (launched, operators.names)


def _hooked(model):
    model.layers[1].mlp.register_forward_hook(lambda *given: None)


def _with_bias(model):
    model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(64))


def _another_class(model):
    class Norm(type(model.norm)):
        pass

    model.layers[2].input_layernorm.__class__ = Norm


def _strided(model):
    weight = model.layers[0].mlp.up_proj.weight
    model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.data.T.contiguous().T)


def _another_backend(model):
    model.layers[1].self_attn.backend = "reference"


def _packed(model):
    from zinit_kernels.packed import PackedLinear, quantise

    mlp = model.layers[0].mlp
    mlp.down_proj = PackedLinear(quantise(mlp.down_proj.weight.data, 8), torch.float32)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "change",
    [_hooked, _with_bias, _another_class, _strided, _another_backend, _packed],
    ids=lambda c: c.__name__[1:],
)
@torch.no_grad()
def test_what_the_kernel_cannot_stand_for_goes_layer_by_layer(change, monkeypatch):
    model = Llama(CONFIG).initialise(0.2).freeze().set_backend("triton")
    change(model)
    monkeypatch.setattr(chosen.Layers, "run", lambda *given: pytest.fail("taken"))
    model.hidden_states(torch.tensor([[3, 4]]), cache=KVCache(CONFIG, 1, 16, torch.float32))


@pytest.mark.interpreted
def test_gradients_autocast_and_many_tokens_go_layer_by_layer(model, monkeypatch):
    model.set_backend("triton")
    monkeypatch.setattr(chosen.Layers, "run", lambda *given: pytest.fail("taken"))
    with torch.no_grad():
        model.hidden_states(torch.full((3, 11), 3), cache=KVCache(CONFIG, 3, 16, torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.hidden_states(torch.tensor([[3]]), cache=KVCache(CONFIG, 1, 16, torch.bfloat16))
    with torch.enable_grad():
        model.hidden_states(torch.tensor([[3]]), cache=KVCache(CONFIG, 1, 16, torch.float32))


@pytest.mark.interpreted
@torch.no_grad()
def test_a_replaced_weight_is_noticed(model):
    model.set_backend("triton")
    cache, token = KVCache(CONFIG, 1, 16, torch.float32), torch.tensor([[3]])
    before = model.hidden_states(token, cache=cache)
    first = cache.decoder[1]
    assert type(first) is DeviceLayers
    held = model.layers[0].mlp.up_proj.weight
    model.layers[0].mlp.up_proj.weight = nn.Parameter(held.data * 2, requires_grad=False)
    cache.lengths.zero_()
    after = model.hidden_states(token, cache=cache)
    model.layers[0].mlp.up_proj.weight = held
    assert cache.decoder[1] is not first and not torch.equal(before, after)
