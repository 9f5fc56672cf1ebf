"""Small adapter files in every format, as the program that the format comes from writes them."""

import json

import torch
from safetensors.torch import save_file

from zinit_kernels.checkpoints import AdapterCheckpoint

LAYERS, HEADS, LENGTH, HIDDEN = 6, 4, 10, 32
ADAPTED = (2, 3, 4, 5)
TOLD = {"prompt_length": LENGTH, "layout": "blocked", "num_heads": HEADS}


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def official_v1():
    state = {"adapter_query.weight": normal(len(ADAPTED) * LENGTH, HIDDEN)}
    for layer in range(LAYERS):
        gate = normal(1, HEADS, 1, 1, seed=layer) if layer in ADAPTED else torch.zeros(1, HEADS, 1, 1)
        state[f"layers.{layer}.attention.gate"] = gate
    return state


def official_v2(lora=False):
    state = {name if "query" in name else f"llama.{name}": tensor for name, tensor in official_v1().items()}
    for layer in range(LAYERS):
        prefix = f"llama.layers.{layer}."
        state[prefix + "attention.wq.bias"] = normal(HIDDEN, seed=50 + layer)
        state[prefix + "attention_norm.weight"] = normal(HIDDEN, seed=60 + layer)
        if lora:
            state[prefix + "attention.new_gate"] = normal(1, 1, 1, 1, seed=70 + layer)
            state[prefix + "attention.lora_wq_l1.weight"] = normal(16, HIDDEN, seed=80 + layer)
    state["llama.norm.weight"] = normal(HIDDEN, seed=99)
    state["visual_query.weight"] = normal(10, 24, seed=98)
    state["visual_blocks.0.attn.qkv.weight"] = normal(72, 24, seed=97)
    state["visual_proj_norm.bias"] = normal(HIDDEN, seed=96)
    return {"model": state, "config": {"w_bias": True, "w_lora": lora, "lora_rank": 16}}


def peft(dtype=torch.float32):
    state = {}
    for layer in ADAPTED:
        prefix = f"base_model.model.model.layers.{layer}.self_attn.adaption_"
        state[prefix + "prompt"] = normal(1, LENGTH, HIDDEN, seed=layer, dtype=dtype)
        state[prefix + "gate"] = normal(1, seed=10 + layer, dtype=dtype)
    return state


def litgpt(v2=False, gate_shape=(1, 1, HEADS, 1)):
    state = {}
    for layer in ADAPTED:
        state[f"transformer.h.{layer}.attn.adapter_wte.weight"] = normal(LENGTH, HIDDEN, seed=layer)
        state[f"transformer.h.{layer}.attn.gating_factor"] = normal(*gate_shape, seed=10 + layer)
    if v2:
        state["transformer.h.0.attn.qkv.adapter_bias"] = normal(96)
        state["transformer.h.0.attn.qkv.adapter_scale"] = normal(96)
        state["transformer.h.0.norm_1.weight"] = normal(HIDDEN)
        state["lm_head.adapter_scale"] = normal(96)
    return {"model": state}


def write_peft(folder, state, **changes):
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": LENGTH, "adapter_layers": len(ADAPTED)}
    config |= {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/llama",
        "target_modules": "self_attn",
    }
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def ours():
    prompts, gates = normal(len(ADAPTED), LENGTH, HIDDEN), normal(len(ADAPTED), HEADS, scale=0.3, seed=1)
    return AdapterCheckpoint(prompts, gates, "tanh", ADAPTED, LAYERS, HEADS, {"base": "tiny"})


FOREIGN = {
    "official-v1": official_v1,
    "official-v2": official_v2,
    "official-v2-lora": lambda: official_v2(lora=True),
    "peft": peft,
    "peft-bfloat16": lambda: peft(torch.bfloat16),
    "litgpt": litgpt,
    "litgpt-v2": lambda: litgpt(v2=True),
}


def put(path, name):
    """A file as the foreign program writes it."""
    if name.startswith("peft"):
        write_peft(path, FOREIGN[name]())
    else:
        torch.save(FOREIGN[name](), path)
    return path


def format_of(name):
    return name.removesuffix("-bfloat16").removesuffix("-lora").replace("litgpt-v2", "litgpt")


def checkpoint(activation="tanh", heads=HEADS, layers=(2, 3, 4, 5), **changes):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(len(layers), LENGTH, HIDDEN, generator=generator)
    gates = 0.3 * torch.randn(len(layers), heads, generator=generator)
    made = {"prompts": prompts, "gates": gates, "gate_activation": activation, "layers": layers}
    made |= {"num_layers": LAYERS, "num_heads": HEADS if heads > 1 else None}
    return AdapterCheckpoint(**made | changes)


def official(num_layers=LAYERS, adapted=4, gate_shape=(1, HEADS, 1, 1), length=LENGTH):
    """As the official script extracts it: a gate for every layer, those of unadapted layers 0 in half
    precision.
    """
    state = {"adapter_query.weight": torch.randn(adapted * length, HIDDEN)}
    for layer in range(num_layers):
        used = layer >= num_layers - adapted
        state[f"layers.{layer}.attention.gate"] = (
            torch.randn(gate_shape) if used else torch.zeros(gate_shape, dtype=torch.half)
        )
    return state


def model_state(stack="model.layers", attention="self_attn", adapted=(1, 2), layers=3, identity=False):
    """A base's weights with prompts among them, as state_dict() names them."""
    state = {f"{stack}.{n}.{attention}.q_proj.weight": normal(HIDDEN, HIDDEN) for n in range(layers)}
    state["embed_tokens.weight"] = normal(9, HIDDEN)
    for n in adapted:
        zinit = f"{stack}.{n}.{attention}.zinit."
        state[zinit + "prompt"] = normal(LENGTH, HIDDEN, seed=n)
        state[zinit + "gate"] = normal(HEADS, seed=10 + n)
        if identity:
            state[zinit + "identity_gate"] = torch.tensor(True)
    return state


def sharded(folder, state, stem="model", places=None):
    names = list(state)
    places = places or {name: f"{stem}-{place % 2}.safetensors" for place, name in enumerate(names)}
    for file in set(places.values()):
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
