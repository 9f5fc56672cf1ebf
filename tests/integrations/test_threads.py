"""One model, several threads: each call has its own adapters, or the base, whatever the others ask for meanwhile."""

import _thread
import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("peft")
from repository import run_python  # noqa: E402
from tiny_peft import CONFIGS, adapted, batch  # noqa: E402
from tiny_transformers import adapted as prompted  # noqa: E402
from tiny_transformers import inputs_of, outputs  # noqa: E402

from zinit_kernels.integrations import transformers as zinit  # noqa: E402
from zinit_kernels.integrations.layers import tokens_of  # noqa: E402
from zinit_kernels.integrations.peft import accelerate  # noqa: E402
from zinit_kernels.integrations.scope import Scope  # noqa: E402

IDS = batch("whole", rows=2)["input_ids"]


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits


class Elsewhere:
    """Code that runs in another thread, one step at a time."""

    def __enter__(self):
        self.pool = ThreadPoolExecutor(1)
        return self

    def __call__(self, function, *args, **kwargs):
        return self.pool.submit(function, *args, **kwargs).result(60)

    def __exit__(self, *_):
        self.pool.shutdown()


@pytest.fixture
def peft_model():
    return accelerate(adapted(CONFIGS["llama-gqa"], gates=2.0, adapters=("default", "second")))


def test_plain_calls_while_another_thread_names_its_adapters(peft_model):
    names = ["second", "__base__"]
    plain, named = logits(peft_model), logits(peft_model, adapter_names=names)
    assert not torch.equal(plain, named)
    modules = dict(peft_model.named_modules())
    with Elsewhere() as elsewhere, Elsewhere() as third:
        contexts = [
            peft_model.base_model._enable_peft_forward_hooks(adapter_names=n) for n in (names, ["default"])
        ]
        elsewhere(contexts[0].__enter__)  # a call of these names has begun there, and another one here
        third(contexts[1].__enter__)
        assert torch.equal(logits(peft_model), plain)
        assert torch.equal(elsewhere(logits, peft_model), named)
        torch.testing.assert_close(third(logits, peft_model), plain, rtol=0, atol=1e-5)
        assert dict(peft_model.named_modules()) == modules
        elsewhere(contexts[0].__exit__, None, None, None)
        third(contexts[1].__exit__, None, None, None)
        assert torch.equal(elsewhere(logits, peft_model), plain)


def test_generating_in_four_threads(peft_model):
    """Decoding keeps projected prompts, for calls of either kind."""
    options = {"max_new_tokens": 6, "do_sample": False}
    calls = [{}, {"adapter_names": ["second", "default"]}, {"adapter_names": ["__base__", "second"]}, {}]
    expected = [peft_model.generate(input_ids=IDS, **options, **call).tolist() for call in calls]
    start = threading.Barrier(4, timeout=60)

    def generate(call):
        start.wait()
        return [peft_model.generate(input_ids=IDS, **options, **call).tolist() for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(generate, calls), expected, strict=True):
            assert found == [right] * 4


def test_the_base_is_asked_for_by_one_thread_alone():
    model, inputs = prompted("Llama"), inputs_of("Llama")
    with_prompts = outputs(model, inputs)
    with zinit.disable_zero_init_attention(model):
        base = outputs(model, inputs)
    assert not torch.equal(base, with_prompts)
    with Elsewhere() as elsewhere:
        first, second = (zinit.disable_zero_init_attention(model) for _ in range(2))
        elsewhere(first.__enter__)
        assert torch.equal(outputs(model, inputs), with_prompts)
        assert torch.equal(elsewhere(outputs, model, inputs), base)
        second.__enter__()
        elsewhere(first.__exit__, None, None, None)  # who entered first leaves first
        assert torch.equal(outputs(model, inputs), base)
        assert torch.equal(elsewhere(outputs, model, inputs), with_prompts)
        copied = copy.deepcopy(model)  # for which nobody asked for the base
        assert torch.equal(outputs(copied, inputs), with_prompts)
        second.__exit__(None, None, None)
    assert torch.equal(outputs(model, inputs), with_prompts)


def test_a_block_may_end_in_another_thread():
    model, inputs = prompted("Llama"), inputs_of("Llama")
    expected = outputs(model, inputs)
    block = zinit.disable_zero_init_attention(model)
    block.__enter__()
    with Elsewhere() as elsewhere:
        elsewhere(block.__exit__, None, None, None)
    assert torch.equal(outputs(model, inputs), expected)


def test_asyncio_tasks_are_threads_too():
    model, inputs = prompted("Llama"), inputs_of("Llama")
    expected = outputs(model, inputs)

    async def disabled():
        with zinit.disable_zero_init_attention(model):
            await asyncio.sleep(0)
            return outputs(model, inputs)

    async def plain():
        return outputs(model, inputs)

    async def both():
        return await asyncio.gather(disabled(), plain())

    base, found = asyncio.run(both())
    assert torch.equal(found, expected) and not torch.equal(base, expected)


def test_compiled_each_thread_has_its_own():
    model, inputs = prompted("Llama"), inputs_of("Llama")
    torch._dynamo.reset()
    model.model.layers[-1].self_attn.compile(backend="eager", fullgraph=True)
    with_prompts = outputs(model, inputs)
    with zinit.disable_zero_init_attention(model):
        base = outputs(model, inputs)
    with Elsewhere() as elsewhere, zinit.disable_zero_init_attention(model):
        assert torch.equal(outputs(model, inputs), base)
        assert torch.equal(elsewhere(outputs, model, inputs), with_prompts)
    assert torch.equal(outputs(model, inputs), with_prompts) and not torch.equal(base, with_prompts)


def test_what_backward_recomputes_is_what_forward_computed():
    """Also where autograd recomputes in a thread of its own, as it does for a GPU."""
    model, inputs = prompted("Llama").train(), inputs_of("Llama")
    model.config.use_cache = False  # transformers 4 would make a mask for the one pass and not for the other
    model.lm_head.requires_grad_(True)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)

    def gradients():
        model.zero_grad()
        with zinit.disable_zero_init_attention(model):
            outputs(model, inputs).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients()
    assert len(expected) == 3 and all(torch.equal(found[name], expected[name]) for name in expected)

    scope, seen = Scope("of this test"), []

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(scope.values())
            return gradient

    x, done = torch.ones(1, requires_grad=True), threading.Event()

    def backward():
        InBackward.apply(x).sum().backward()
        done.set()

    with Elsewhere() as elsewhere, scope.holding("block"):
        elsewhere(backward)  # in a thread of Python's, which has no block
        done.clear()
        _thread.start_new_thread(backward, ())  # one that threading does not know, like those of PyTorch
        assert done.wait(60) and seen == [(), ("block",)] and elsewhere(scope.values) == ()
        assert elsewhere(scope.values, True) == ("block",)  # a replica of nn.DataParallel


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_backward_recomputes_after_the_block(reentrant):
    """And, of two calls, each as it was: one of the base, and one with prompts."""
    model, inputs = prompted("Llama").train(), inputs_of("Llama")
    model.config.use_cache = False
    model.lm_head.requires_grad_(True)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    model.enable_input_require_grads()

    def gradients():
        model.zero_grad()
        with zinit.disable_zero_init_attention(model):
            base = outputs(model, inputs)
        loss = (base - 3 * outputs(model, inputs)).square().sum()
        with zinit.disable_zero_init_attention(model), torch.no_grad():
            outputs(model, inputs)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients()
    assert len(expected) == 7 and all(torch.equal(found[name], expected[name]) for name in expected)
    wrapped = model.model.layers[0]._gradient_checkpointing_func
    assert wrapped is not zinit.remove_zero_init_attention(model).model.layers[0]._gradient_checkpointing_func


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("before", [False, True], ids=["a first block", "a block before"])
def test_a_block_within_a_checkpointed_layer(before, reentrant):
    """Code within the layer asks for the base."""
    model, inputs = prompted("Llama", gates=2.0).train(), inputs_of("Llama")
    model.config.use_cache = False
    model.enable_input_require_grads()
    attention = model.model.layers[-1].self_attn
    forward = attention.forward

    def without_prompts(*args, **kwargs):
        with zinit.disable_zero_init_attention(model):
            return forward(*args, **kwargs)

    attention.forward = without_prompts

    def gradients():
        model.zero_grad()
        if before:
            with zinit.disable_zero_init_attention(model), torch.no_grad():
                outputs(model, inputs)
        out = outputs(model, inputs)
        out.square().sum().backward()
        return out.detach(), {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    expected, gradients_expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        out, found = gradients()
        assert torch.equal(out, expected) and found.keys() == gradients_expected.keys()
        assert all(torch.equal(found[name], gradients_expected[name]) for name in found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_backward_recomputes_of_rows_with_adapters_of_their_own(peft_model, reentrant):
    """adapter_names is refused in training mode, but parts of the model may be in it."""
    names = ["second", "default"]

    def gradients():
        peft_model.zero_grad()
        for layer in peft_model.base_model.model.model.layers:
            layer.training = True
        peft_model(input_ids=IDS, labels=IDS, adapter_names=names).loss.backward()
        return {name: p.grad.clone() for name, p in peft_model.named_parameters() if p.grad is not None}

    expected = gradients()
    peft_model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    peft_model.enable_input_require_grads()
    found = gradients()
    assert len(expected) == 6
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


def test_what_backward_recomputes_in_one_thread_while_another_asks_for_the_base():
    model, inputs = prompted("Llama").train(), inputs_of("Llama")
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradients():
        model.zero_grad()
        outputs(model, inputs).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with Elsewhere() as elsewhere, zinit.disable_zero_init_attention(model):
        found = elsewhere(gradients)
    assert len(expected) == 4 and all(torch.equal(found[name], expected[name]) for name in expected)


def test_adapter_names_in_a_replica_are_refused(peft_model):
    peft_model.base_model._is_replica = True  # as nn.DataParallel marks its copies
    with pytest.raises(ValueError, match="adapter_names is not supported under nn.DataParallel"):
        logits(peft_model, adapter_names=["second", "default"])


def test_new_prompts_do_not_stand_in_a_block_of_freed_ones():
    """Python gives the id of a freed object to a new one."""
    model, seen = prompted("Llama"), set()
    for _ in range(20):
        zinit.remove_zero_init_attention(model)
        tokens = tokens_of(zinit.add_zero_init_attention(model, 2))
        assert tokens and seen.isdisjoint(tokens)
        seen |= tokens


def test_first_imports_of_several_threads():
    """transformers puts another module in its own place at the end of its import."""
    code = "import importlib, sys, threading, torch\n"
    code += "names = [f'zinit_kernels.integrations.{name}' for name in ('transformers', 'peft')] * 4\n"
    code += "threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]\n"
    code += "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
    code += "print(*(hasattr(sys.modules[name], 'NAME') or hasattr(sys.modules[name], 'summary') for name in names))"
    done = run_python("-c", code)
    assert done.stdout.split() == ["True"] * 8 and "Error" not in done.stderr, done.stderr
