"""The model: layouts agree, the base stays frozen, little is kept for backward, PEFT's adapters give PEFT's
logits.
"""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from tiny_models import KINDS, hf_directory, hf_model, pack, prompts
from torch.nn.functional import scaled_dot_product_attention

from model import loss as loss_module
from model.adapter import LlamaAdapter
from model.config import AdapterConfig, LlamaConfig
from model.layers import RMSNorm, Rotary, SwiGLU, rotary_table
from model.llama import Attention, KVCache, Layout, Llama
from model.loading import load_base
from model.loss import IGNORE, answer_loss

CONFIG = LlamaConfig(160, 64, 96, num_layers=4, num_heads_q=8, num_heads_kv=2, head_dim=8, sliding_window=7)
LENGTHS = (5, 23, 1, 12)


def base_and_adapter(config=CONFIG, adapter=AdapterConfig(gate_init="random"), seed=0):  # noqa: B008
    torch.manual_seed(seed)
    return Llama(config).initialise(0.12).freeze(), LlamaAdapter(config, adapter)


def test_packed_and_padded_are_the_sequences_alone():
    base, adapter = base_and_adapter()
    sequences = prompts(LENGTHS)
    alone = torch.cat([base(sequence[None], adapter)[0] for sequence in sequences])
    packed, cu_seqlens = pack(sequences)
    torch.testing.assert_close(base(packed, adapter, cu_seqlens=cu_seqlens), alone, rtol=0, atol=1e-5)
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    logits = base(padded, adapter)
    padded = torch.cat([logits[row, : len(sequence)] for row, sequence in enumerate(sequences)])
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)
    assert (alone - torch.cat([base(s[None])[0] for s in sequences])).abs().max() > 0.1


def test_without_gates_the_prompts_join_the_tokens_softmax():
    config = dataclasses.replace(CONFIG, sliding_window=None)
    base, adapter = base_and_adapter(config, AdapterConfig(4, 2, gate_init="none"))
    attention, lengths = base.layers[2].self_attn, LENGTHS
    prompt = adapter(attention)
    assert adapter(base.layers[1].self_attn) is None and prompt.gate is None
    x = torch.randn(sum(lengths), 64)
    positions = torch.cat([torch.arange(length) for length in lengths])
    cos, sin = (table[:, None] for table in rotary_table(config, positions))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    ours = attention(x, Layout(cos, sin, cu_seqlens, max(lengths), None, None), prompt)
    expected = []
    for rows in torch.arange(len(x)).split(lengths):
        query, key, value = (
            project(x[rows]).unflatten(-1, (-1, 8))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = (Rotary.apply(each, cos[rows], sin[rows]) for each in (query, key))
        keys, values = torch.cat([prompt.key, key]), torch.cat([prompt.value, value])
        seen = torch.ones(len(rows), len(keys), dtype=torch.bool).tril(4)
        heads = (each.transpose(0, 1)[None] for each in (query, keys, values))
        out = scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
        expected.append(attention.o_proj(out.flatten(-2)))
    torch.testing.assert_close(ours, torch.cat(expected), rtol=0, atol=1e-5)
    gradients = [
        torch.autograd.grad(out.square().sum(), adapter.prompts, retain_graph=True)[0][0]
        for out in (ours, torch.cat(expected))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert gradients[0].any(-1).all()


def test_cached_steps_are_the_full_forward():
    base, adapter = base_and_adapter()
    sequences, continuations = prompts(LENGTHS), torch.stack(prompts([6] * len(LENGTHS), seed=2))
    packed, cu_seqlens = pack(sequences)
    with torch.no_grad():
        cache = KVCache(CONFIG, len(LENGTHS), max(LENGTHS) + 6, torch.float32)
        cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
        first = base(packed, adapter, cu_seqlens=cu_seqlens, cache=cache)
        without = base(packed, adapter, cu_seqlens=cu_seqlens)  # layer by layer, with other kernels
        torch.testing.assert_close(first, without, rtol=0, atol=1e-5)
        steps = [base(part, adapter, cache=cache) for part in continuations.split([1, 1, 3, 1], 1)]
        assert cache.lengths.tolist() == [length + 6 for length in LENGTHS]
        for row, sequence in enumerate(sequences):
            full = base(torch.cat([sequence, continuations[row]])[None], adapter)[0, -6:]
            torch.testing.assert_close(torch.cat(steps, 1)[row], full, rtol=0, atol=1e-5)
        chosen = cache.select([2, 0])
        again = base(continuations[[2, 0], :1], adapter, cache=KVCache.select(chosen, [0, 1]))
        assert again.isfinite().all() and chosen.lengths.tolist() == [7, 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gate_is_the_base_bit_for_bit(dtype):
    base, adapter = base_and_adapter(adapter=AdapterConfig())
    base = base.to(dtype)
    packed, cu_seqlens = pack(prompts(LENGTHS))
    assert torch.equal(base(packed, adapter, cu_seqlens=cu_seqlens), base(packed, cu_seqlens=cu_seqlens))
    padded = torch.stack(prompts([20, 20]))
    assert torch.equal(base(padded, adapter), base(padded))
    with torch.no_grad():
        logits = []
        for given in (adapter, None):
            cache = KVCache(CONFIG, len(LENGTHS), 30, dtype)
            base(packed, given, cu_seqlens=cu_seqlens, cache=cache)
            logits.append(base(torch.full((len(LENGTHS), 1), 9), given, cache=cache))
    assert torch.equal(*logits)


@pytest.mark.parametrize("packed", [True, False])
def test_only_the_adapter_trains(packed):
    base, adapter = base_and_adapter(adapter=AdapterConfig(prompt_length=3))
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    sequences = prompts([16, 16])
    tokens, cu_seqlens = pack(sequences) if packed else (torch.stack(sequences), None)
    targets = tokens.roll(-1, -1)
    losses = []
    for step in range(3):
        start = [parameter.detach().clone() for parameter in adapter.parameters()]
        loss = answer_loss(
            base.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens), targets, base.output_weight
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert (adapter.gates.grad != 0).all()
        assert (adapter.prompts.grad == 0).all() if step == 0 else (adapter.prompts.grad != 0).any(-1).all()
        moved = [bool((a != b).any(-1).all()) for a, b in zip(start, adapter.parameters(), strict=True)]
        assert all(moved) or step == 0
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert adapter.prompts.dtype == adapter.gates.dtype == torch.float32
    for name, parameter in base.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name]), name


def test_layers_below_the_adapter_record_nothing():
    base, adapter = base_and_adapter()
    recorded = []
    for layer in base.layers:
        layer.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    base(torch.stack(prompts([8])), adapter)
    assert recorded == [False, False, True, True]


def saved_bytes(base, run):
    """Bytes of the distinct storages that autograd keeps, parameters left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}
    storages = {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_kept_around_attention(monkeypatch, dtype):
    """Per layer: two norm inputs, two floats a row, the SwiGLU's two inputs. No linear keeps its input."""
    base, adapter = base_and_adapter()
    base, (total, layers) = base.to(dtype), (200, 2)

    def attend(self, query, key, value, layout, prompt):
        return query if prompt is None else query + prompt.value.sum()

    monkeypatch.setattr(Attention, "attend", attend)
    tokens, cu_seqlens = pack(prompts([50] * 4))
    kept = saved_bytes(base, lambda: base.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens))
    size = dtype.itemsize
    # the lowest adapted layer's first norm has a frozen input and keeps nothing; the final norm keeps as much
    assert kept == layers * total * (
        2 * (CONFIG.hidden_size * size + 4) + 2 * CONFIG.intermediate_size * size
    )


@pytest.mark.native
def test_activations_kept_with_attention():
    """Attention adds its four operands, the log-sum-exp, and what the whole batch shares."""
    base, adapter = base_and_adapter()
    tokens, cu_seqlens = pack(prompts([50] * 4))
    kept = saved_bytes(base, lambda: base.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens))
    around = 2 * 200 * 4 * (2 * (64 + 1) + 2 * 96)
    heads = 8 + 8 + 2 + 2  # query and output, key and value
    attention = 2 * 200 * 4 * (heads * 8 + 8)
    shared = (
        200 * 8 * 4 * 2 + 2 * (10 * 2 * 2 * 8 * 4 + 8 * 4) + 64
    )  # rotary tables, prompts and gates, cu_seqlens
    assert around + attention < kept <= around + attention + shared + 4096


def test_answer_loss_is_cross_entropy(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_LOGITS", 160 * 7)
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 64, requires_grad=True)
    weight = torch.randn(160, 64).mul_(0.12).requires_grad_()  # logits of unit size
    targets = torch.randint(0, 160, (3, 20))
    targets[:, :6] = IGNORE
    for reduction in ("mean", "sum"):
        expected = torch.nn.functional.cross_entropy(
            (hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction
        )
        actual = answer_loss(hidden, targets, weight, reduction)
        torch.testing.assert_close(actual, expected)
        wanted = torch.autograd.grad(expected * 3, (hidden, weight))
        for ours, theirs in zip(torch.autograd.grad(actual * 3, (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    none = answer_loss(hidden, torch.full_like(targets, IGNORE), weight)
    none.backward()
    assert none == 0 and (hidden.grad == 0).all()


def test_answer_loss_projects_answers_only(monkeypatch):
    projected = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: projected.append(len(x)) or linear(x, w))
    targets = torch.full((50,), IGNORE)
    targets[-4:] = 3
    answer_loss(torch.randn(50, 64), targets, torch.randn(160, 64))
    assert projected == [4]


def test_pieces_against_gradcheck():
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True).unbind()
    norm = RMSNorm(8, 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)), (x, norm.weight)
    )
    assert torch.autograd.gradcheck(SwiGLU.apply, (x, y))
    cos, sin = (table.double()[:, None] for table in rotary_table(CONFIG, torch.arange(3)))
    assert torch.autograd.gradcheck(lambda x: Rotary.apply(x, cos, sin), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_gradients_are_those_of_transformers(tmp_path, kind):
    """An unfrozen base trains too: the demo makes its own."""
    hf = hf_directory(tmp_path, kind)
    base = load_base(tmp_path)
    tokens = torch.stack(prompts([18, 18]))
    hf(tokens, labels=tokens).loss.backward()
    targets = tokens.roll(-1, -1)
    targets[:, -1] = IGNORE
    answer_loss(base.hidden_states(tokens), targets, base.output_weight).backward()
    for name, parameter in base.named_parameters():
        expected = hf.get_parameter(name if name == "lm_head.weight" else f"model.{name}").grad
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bfloat16_base_and_autocast_stay_near_float32():
    base, adapter = base_and_adapter()
    tokens, cu_seqlens = pack(prompts(LENGTHS))

    def gradients(model):
        adapter.zero_grad()
        answer_loss(
            model.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens), tokens, base.output_weight
        ).backward()
        assert adapter.prompts.grad.dtype == adapter.gates.grad.dtype == torch.float32
        return torch.cat([adapter.prompts.grad.flatten(), adapter.gates.grad.flatten()])

    exact = gradients(base)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(base)
    low = gradients(base.to(torch.bfloat16))
    for gradient in (mixed, low):
        assert 0 < (gradient - exact).norm() < 0.05 * exact.norm()


def count_projections(base):
    calls = []
    for layer in base.layers:
        layer.self_attn.k_proj.register_forward_hook(
            lambda module, inputs, output: calls.append(inputs[0].shape)
        )
    return calls


def test_a_write_through_data_is_seen_after_forget():
    base, adapter = base_and_adapter()
    tokens = torch.stack(prompts([9]))
    with torch.no_grad():
        base(tokens, adapter)
        adapter.prompts.data.mul_(-3)
        adapter.forget()
        kept = base(tokens, adapter)
    torch.testing.assert_close(base(tokens, adapter), kept, rtol=0, atol=0)


def test_projected_prompts_are_kept_and_never_stale():
    base, adapter = base_and_adapter()
    tokens = torch.stack(prompts([9]))
    calls = count_projections(base)

    def evaluate():
        calls.clear()
        with torch.no_grad():
            logits = base(tokens, adapter)
        return logits, len(calls) - CONFIG.num_layers  # prompt projections

    first, count = evaluate()
    assert count == 2
    again, count = evaluate()
    assert count == 0 and torch.equal(first, again)
    torch.testing.assert_close(base(tokens, adapter), first, rtol=0, atol=0)  # under gradients: computed anew

    # validation between steps must not stop training; a fused step moves no version
    for fused in (False, True, True):
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1, fused=fused)
        before = adapter.prompts.detach().clone()
        base(tokens, adapter).logsumexp(-1).sum().backward()
        assert (adapter.prompts.grad != 0).any()
        optimizer.step()
        optimizer.zero_grad()
        assert (before != adapter.prompts).any()
        stepped, count = evaluate()
        assert count == 2 and not torch.equal(stepped, first)
        first = stepped

    changes = {
        "loaded": lambda: adapter.load_state_dict({k: v + 0.1 for k, v in adapter.state_dict().items()}),
        "replaced": lambda: setattr(adapter, "prompts", torch.nn.Parameter(adapter.prompts + 0.1)),
        "base changed": lambda: torch.no_grad()(base.layers[3].self_attn.v_proj.weight.mul_)(1.5),
        "base cast": lambda: base.to(torch.bfloat16),
    }
    for name, change in changes.items():
        change()
        changed, count = evaluate()
        assert count > 0 and not torch.equal(changed, first), name
        first = changed


def test_kept_prompts_of_replaced_tensors_are_never_taken_for_the_new_ones():
    """Python gives the id of what is gone away again, and torch its memory: neither tells two tensors apart."""
    base, adapter = base_and_adapter()
    attention = base.layers[3].self_attn
    with torch.no_grad():
        for trial in range(20):
            adapter(attention)
            for value in (1000.0, float(trial)):
                del adapter.prompts
                adapter.prompts = torch.nn.Parameter(torch.full((2, 4, CONFIG.hidden_size), value))
            expected = adapter._project(1, attention).key
            assert torch.equal(adapter(attention).key, expected), trial
        for trial in range(20):
            adapter.prompts = torch.nn.Parameter(torch.randn(2, 4, CONFIG.hidden_size))
            adapter(attention)
            base.to(torch.bfloat16).to(torch.float32)
            base.layers[3].self_attn.k_proj.weight.data = torch.randn_like(attention.k_proj.weight)
            expected = adapter._project(1, attention).key
            assert torch.equal(adapter(attention).key, expected), trial
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert adapter(attention).key.dtype == dtype


def test_an_adapter_can_be_pickled_and_copied(tmp_path):
    base, adapter = base_and_adapter()
    tokens = torch.stack(prompts([9]))
    with torch.no_grad():
        expected = base(tokens, adapter)  # and projections are kept
        torch.save(adapter, tmp_path / "adapter")
        loaded = torch.load(tmp_path / "adapter", weights_only=False)
        for other in (loaded, copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            assert torch.equal(base(tokens, other), expected)
            other.prompts.mul_(-3)
            assert not torch.equal(base(tokens, other), expected)
        assert torch.equal(base(tokens, adapter), expected)


def test_one_adapter_on_two_bases():
    (base, adapter), (other, _) = base_and_adapter(), base_and_adapter(seed=1)
    tokens = torch.stack(prompts([9]))
    with torch.no_grad():
        expected = [base(tokens, adapter), other(tokens, adapter)]
        assert not torch.equal(*expected)
        assert torch.equal(base(tokens, adapter), expected[0])
    with torch.inference_mode():
        assert torch.equal(other(tokens, adapter), expected[1])


def test_trainable_parameters_of_the_papers_7b():
    config = LlamaConfig(32000, 4096, 11008, num_layers=32, num_heads_q=32, num_heads_kv=32, head_dim=128)
    adapter = LlamaAdapter(config)
    assert adapter.num_parameters == 30 * 10 * 4096 + 30 * 32 == 1_229_760
    assert adapter.layers == tuple(range(2, 32)) and (adapter.gates == 0).all()


@pytest.mark.parametrize("kind", ["llama", "llama3", "mistral"])
def test_logits_are_those_of_peft(tmp_path, kind):
    import peft

    hf_directory(tmp_path, kind)
    hf = hf_model(kind)
    config = peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=3, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(hf, config).eval()
    base, ours = (
        load_base(tmp_path).freeze(),
        LlamaAdapter(load_base(tmp_path).config, AdapterConfig(5, 3, "identity")),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "adaption_gate" in name:
                parameter.copy_(torch.randn(1, generator=generator))
        adapted = dict(theirs.named_parameters())
        for row, layer in enumerate(ours.layers):
            prefix = f"base_model.model.model.layers.{layer}.self_attn"
            ours.prompts[row] = adapted[f"{prefix}.adaption_prompt"][0]
            ours.gates[row] = adapted[f"{prefix}.adaption_gate"]
    tokens = torch.stack(prompts([30, 30]))
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        with theirs.disable_adapter():
            assert (theirs(input_ids=tokens).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(base(tokens, ours), expected, rtol=0, atol=1e-5)
