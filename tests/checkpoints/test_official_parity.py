"""Every implementation in use, from its equations: the same attention through this package, by each one's gate rule.

The layer is written here once, as LLaMA-Adapter's paper has it (arXiv 2303.16199, equations 3 to 8): one row of scores
over prompts and tokens, S = [S^K; S^M], each part softmaxed by itself, the first scaled by the gate, the rotary
embedding on neighbouring pairs as Meta's code has it. What differs from program to program is the ROWS' own:

    program                 gate file       applied as            prompts
    V1, training            [1, H, 1, 1]    tanh                  shared
    V1, published inference the same file   as it is              shared
    V1, first release       [1]             as it is              shared
    V2 multimodal           [1, H, 1, 1]    tanh                  one set a sample: adapter_query + visual
    V2 with LoRA            and [1,1,1,1]   tanh * new_gate       the same; factors and biases concern tokens alone
    ImageBind-LLM           [1, H, 1, 1]    tanh                  one a sample: no softmax at all
    PEFT                    [1]             as it is              shared, output projected by itself
    litgpt                  [1, 1, H, 1]    as it is              shared; rows of qkv by its layout
"""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from zinit_kernels import zero_init_attention
from zinit_kernels.checkpoints import load_adapter

LAYERS, ADAPTED, HEADS, HEAD_DIM, PROMPTS, BATCH, TOKENS = 3, 2, 4, 8, 10, 2, 7
HIDDEN = HEADS * HEAD_DIM


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(rows, seed):
    return random(rows, HIDDEN, seed=seed) / math.sqrt(HIDDEN)


def gates(shape):
    """The lowest layer has no prompts, and the gate it began with."""
    return {0: torch.zeros(shape)} | {layer: random(*shape, seed=10 + layer) for layer in range(1, LAYERS)}


def rotated(heads):
    """[B, T, H, D], neighbouring pairs turned by position / 10000 ** (2 i / D)."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(heads.shape[1]).float(), frequencies)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def from_the_equations(x, layer, prompt, gate):
    """[B, T, C] before the output projection. layer: wq, wk, wv for tokens, wk, wv for prompts [B or 1, P, C]."""
    query, key, value = (project(x).unflatten(-1, (-1, HEAD_DIM)) for project in layer[:3])
    query, key = rotated(query), rotated(key)
    prompt_key, prompt_value = (
        project(prompt).unflatten(-1, (-1, HEAD_DIM)).expand(len(x), -1, -1, -1) for project in layer[3:]
    )
    repeat = HEADS // key.shape[2]
    keys, values = (
        torch.cat(pair, 1).repeat_interleave(repeat, 2).transpose(1, 2)
        for pair in ((prompt_key, key), (prompt_value, value))
    )
    scores = query.transpose(1, 2) @ keys.mT / math.sqrt(HEAD_DIM)  # equation 4: [S^K; S^M]
    count = prompt.shape[1]
    unseen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    tokens = scores[..., count:].masked_fill(unseen, -torch.inf).softmax(-1)
    prompts = torch.ones_like(scores[..., :1]) if count == 1 else scores[..., :count].softmax(-1)
    weights = torch.cat([gate * prompts, tokens], -1)  # equation 5
    return (weights @ values).transpose(1, 2).flatten(2)  # equation 6


def from_this_package(x, layer, prompt, gate, activation):
    query, key, value = (project(x).unflatten(-1, (-1, HEAD_DIM)) for project in layer[:3])
    table = (project(prompt).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for project in layer[3:])
    tokens = (heads.transpose(1, 2) for heads in (rotated(query), rotated(key), value))
    out = zero_init_attention(*tokens, *table, gate, is_causal=True, gate_activation=activation)
    return out.transpose(1, 2).flatten(2)


def linear(rows, seed, bias=None):
    matrix = weight(rows, seed)
    return lambda hidden: F.linear(hidden, matrix, bias)


def multi_head():
    query, key, value = (linear(HIDDEN, seed) for seed in (1, 2, 3))
    return query, key, value, key, value


def with_lora():
    """V2: low-rank factors and a bias beside wq, wk, wv, which prompts do not go through."""
    plain = [linear(HIDDEN, seed) for seed in (1, 2, 3)]
    factors = [(weight(4, seed), random(HIDDEN, 4, seed=seed + 1) / 2) for seed in (20, 22, 24)]
    bias = random(HIDDEN, seed=26)

    def adapted(base, down, up, bias):
        return lambda hidden: base(hidden) + F.linear(F.linear(hidden, down), up) + bias

    query, key, value = (
        adapted(base, *pair, bias if base is plain[0] else 0.0)
        for base, pair in zip(plain, factors, strict=True)
    )
    return query, key, value, plain[1], plain[2]


def grouped(rows=None):
    """PEFT's and litgpt's grouped queries: two heads to one key. rows: of [Q | K | V] for the prompts."""
    whole = torch.cat([weight(HIDDEN, 1), weight(HIDDEN // 2, 2), weight(HIDDEN // 2, 3)])
    query, key, value = whole.split([HIDDEN, HIDDEN // 2, HIDDEN // 2])
    prompt_key, prompt_value = (key, value) if rows is None else rows(whole)
    return tuple(
        lambda hidden, m=matrix: F.linear(hidden, m)
        for matrix in (query, key, value, prompt_key, prompt_value)
    )


def group_by_group(whole):
    """What litgpt reads from 0.5.5 on: queries, a key and a value for each group in turn."""
    groups = whole.unflatten(0, (2, -1, HEAD_DIM))
    return groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)


def v1_file(path, shape=(1, HEADS, 1, 1)):
    state = {"adapter_query.weight": random(ADAPTED * PROMPTS, HIDDEN, seed=5)}
    torch.save(state | {f"layers.{n}.attention.gate": gate for n, gate in gates(shape).items()}, path)


def v2_file(path, lora=False):
    state = {"adapter_query.weight": random(ADAPTED * PROMPTS, HIDDEN, seed=5)}
    for n, gate in gates((1, HEADS, 1, 1)).items():
        state[f"llama.layers.{n}.attention.gate"] = gate
        if lora:
            state[f"llama.layers.{n}.attention.new_gate"] = random(1, 1, 1, 1, seed=30 + n)
    torch.save({"model": state, "config": {"w_lora": lora}}, path)


def peft_file(path):
    state, table = {}, random(ADAPTED * PROMPTS, HIDDEN, seed=5).unflatten(0, (ADAPTED, 1, PROMPTS))
    for row, n in enumerate(range(LAYERS - ADAPTED, LAYERS)):
        prefix = f"base_model.model.model.layers.{n}.self_attn.adaption_"
        state |= {prefix + "prompt": table[row], prefix + "gate": gates((1,))[n]}
    save_file(state, path)


def litgpt_file(path):
    state, table = {}, random(ADAPTED * PROMPTS, HIDDEN, seed=5).unflatten(0, (ADAPTED, PROMPTS))
    for row, n in enumerate(range(LAYERS - ADAPTED, LAYERS)):
        prefix = f"transformer.h.{n}.attn."
        state |= {
            prefix + "adapter_wte.weight": table[row],
            prefix + "gating_factor": gates((1, 1, HEADS, 1))[n],
        }
    torch.save({"model": state}, path)


def as_it_is(layer, shape=(1, HEADS, 1, 1)):
    return gates(shape)[layer].reshape(1, -1, 1, 1)


def tanh(layer):
    return as_it_is(layer).tanh()


def tanh_times_new_gate(layer):
    return as_it_is(layer).tanh() * random(1, 1, 1, 1, seed=30 + layer)


def one(layer):
    return as_it_is(layer, (1,))


def heads_third(layer):
    return as_it_is(layer, (1, 1, HEADS, 1))


ROWS = {  # file, options of load_adapter, the gate as applied, the layer's projections, prompts of each sample
    "V1 training": (v1_file, {}, tanh, multi_head, False),
    "V1 inference": (v1_file, {"gate_activation": "identity"}, as_it_is, multi_head, False),
    "V1 first release": (lambda path: v1_file(path, (1,)), {}, one, multi_head, False),
    "V2 multimodal": (v2_file, {}, tanh, multi_head, True),
    "V2 with LoRA": (lambda path: v2_file(path, True), {}, tanh_times_new_gate, with_lora, True),
    "PEFT": (peft_file, {}, one, grouped, False),
    "litgpt": (litgpt_file, {"layout": "blocked"}, heads_third, grouped, False),
    "litgpt 0.5.5": (
        litgpt_file, {"layout": "interleaved"}, heads_third, lambda: grouped(group_by_group), False,
    ),
}  # fmt: skip


def assert_same(x, layer, prompts, rule, gate, activation):
    """Outputs, and the gradients of prompts; `rule` is the gate as the program applies it."""
    found_prompts, right_prompts = (prompts.clone().requires_grad_() for _ in range(2))
    found = from_this_package(x, layer, found_prompts, gate, activation)
    right = from_the_equations(x, layer, right_prompts, rule)
    without = from_the_equations(x, layer, prompts, torch.zeros_like(rule))
    assert (found - right).abs().max() <= 1e-5 and (right - without).abs().max() > 0.1
    upstream = random(*found.shape, seed=9)
    found.backward(upstream)
    right.backward(upstream)
    size = right_prompts.grad.norm()
    assert size > 0 and (found_prompts.grad - right_prompts.grad).norm() <= 1e-4 * size


@pytest.mark.parametrize("name", ROWS)
def test_a_program_and_its_file(tmp_path, name):
    write, options, rule, projections, of_each_sample = ROWS[name]
    write(tmp_path / "file")
    adapter = load_adapter(tmp_path / "file", **options)
    assert adapter.layers == (1, 2)
    x, table = random(BATCH, TOKENS, HIDDEN, seed=6), random(ADAPTED * PROMPTS, HIDDEN, seed=5)
    for row, layer in enumerate(adapter.layers):
        prompts = table[row * PROMPTS : (row + 1) * PROMPTS][None]
        assert torch.equal(adapter.prompts[row], prompts[0])
        if of_each_sample:
            prompts = prompts + random(BATCH, PROMPTS, HIDDEN, seed=7)
        assert_same(x, projections(), prompts, rule(layer), adapter.gates[row], adapter.gate_activation)


def test_imagebind_has_one_prompt_a_sample_and_needs_no_softmax():
    prompts = random(1, 1, HIDDEN, seed=5) + random(BATCH, 1, HIDDEN, seed=7)
    x, gate = random(BATCH, TOKENS, HIDDEN, seed=6), gates((1, HEADS, 1, 1))[2]
    assert_same(x, multi_head(), prompts, gate.tanh(), gate, "tanh")


def test_peft_projects_the_prompts_output_by_itself():
    """Without a bias the output projection of the sum is the sum of the projections."""
    x, prompts, gate = random(BATCH, TOKENS, HIDDEN, seed=6), random(1, PROMPTS, HIDDEN, seed=5), one(2)
    layer, project = grouped(), linear(HIDDEN, 4)
    tokens = from_the_equations(x, layer, prompts, torch.zeros(1, 1, 1, 1))
    both = from_the_equations(x, layer, prompts, gate)
    found = project(from_this_package(x, layer, prompts, gate, "identity"))
    assert (found - project(tokens) - project(both - tokens)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["V1 training", "V1 inference", "V1 first release", "PEFT"])
def test_the_file_in_a_transformers_llama(tmp_path, name):
    """Its rotary embedding turns halves: the official weights go into it with their rows in another order."""
    transformers = pytest.importorskip("transformers")
    from zinit_kernels.integrations import transformers as zinit

    write, options, rule, projections, _ = ROWS[name]
    layer = projections()
    write(tmp_path / "file")
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=layer[1](torch.eye(HIDDEN)).shape[1] // HEAD_DIM, vocab_size=32,
    )  # fmt: skip
    model = zinit.load_adapter(
        transformers.LlamaForCausalLM(config), tmp_path / "file", num_heads=HEADS, **options
    )
    x = random(BATCH, TOKENS, HIDDEN, seed=6)
    for number in (1, 2):
        attention = model.model.layers[number].self_attn
        for into, project in zip(("q_proj", "k_proj", "v_proj"), layer, strict=False):
            rows = project(torch.eye(HIDDEN)).T
            if into != "v_proj":
                rows = rows.unflatten(0, (-1, HEAD_DIM // 2, 2)).transpose(1, 2).flatten(0, 2)
            getattr(attention, into).weight.data.copy_(rows)
        position = model.model.rotary_emb(x, torch.arange(TOKENS)[None])
        found = attention(x, position_embeddings=position, attention_mask=None)[0]
        prompts = random(ADAPTED * PROMPTS, HIDDEN, seed=5)[(number - 1) * PROMPTS :][:PROMPTS][None]
        right = attention.o_proj(from_the_equations(x, layer, prompts, rule(number)))
        assert (found - right).abs().max() <= 1e-5 and right.abs().max() > 0.1
