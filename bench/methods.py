"""Ways to fine-tune the same base: this project's adapter, PEFT's (also accelerated), litgpt's, LoRA, all weights.

The base is this project's LLaMA with random weights. Other programs' models share its weights wherever they keep them
in the same tensors; full fine-tuning, which writes to them, has a copy. Gates are away from zero, so that no work is
skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.adapter import LlamaAdapter
from model.config import AdapterConfig, LlamaConfig
from model.llama import Llama
from model.loss import answer_loss

from .machine import why_failed, why_missing
from .problem import PROMPTS

LORA_RANKS = (2, 4, 8, 16, 32)
GATE_VALUE = 0.1

# LLaMA-7B at an eighth of its width, with all of its 32 layers, 30 of them adapted: 105 million parameters
EIGHTH = LlamaConfig(4000, 512, 1376, num_layers=32, num_heads_q=4, num_heads_kv=4, head_dim=128)
SEVEN_BILLION = LlamaConfig(32000, 4096, 11008, num_layers=32, num_heads_q=32, num_heads_kv=32, head_dim=128)
THREE_BILLION = LlamaConfig(
    128256, 3072, 8192, num_layers=28, num_heads_q=24, num_heads_kv=8, head_dim=128, rope_theta=500000.0
)
SMOLLM2 = LlamaConfig(
    49152, 576, 1536, num_layers=30, num_heads_q=9, num_heads_kv=3, head_dim=64, rope_theta=100000.0,
    tie_embeddings=True,
)  # fmt: skip
ONE_BILLION = LlamaConfig(
    128256, 2048, 8192, num_layers=16, num_heads_q=32, num_heads_kv=8, head_dim=64, rope_theta=500000.0,
    tie_embeddings=True,
)  # fmt: skip
TINY = LlamaConfig(256, 64, 172, num_layers=4, num_heads_q=2, num_heads_kv=2, head_dim=32)

# a few layers of Llama-3.2-1B, all of them adapted, and the vocabulary of LLaMA
ONE_BILLION_SLICE = LlamaConfig(
    32000, 2048, 8192, num_layers=3, num_heads_q=32, num_heads_kv=8, head_dim=64, rope_theta=500000.0
)

# by how much of its value a loss may differ from the one in float64
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

ADAPTER, PEFT, LITGPT = "zinit adapter", "PEFT adaption prompt", "litgpt adapter"
ACCELERATED = f"{PEFT}, accelerated"
NEEDS_HF, NEEDS_PEFT = ("transformers",), ("transformers", "peft")


def unadapted_layers(config: LlamaConfig) -> int:
    """The paper adapts all but the lowest two layers. Of a slice of a model, which stands for its middle, all."""
    return 2 if config.num_layers > 3 else 0


def random_base(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """A frozen LLaMA with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(config).to(dtype)
    return model.initialise().freeze()


def in_transformers(base: Llama) -> Any:
    """transformers' LLaMA on the same weights."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers_config(base.config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {
        name if name == "lm_head.weight" else f"model.{name}": w for name, w in base.state_dict().items()
    }
    weights["lm_head.weight"] = base.output_weight  # of tied embeddings it has no name of its own
    model.load_state_dict(weights, assign=True)
    with torch.device(base.device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are not among the weights
    return model.requires_grad_(False)


def transformers_config(config: LlamaConfig) -> Any:
    from transformers import LlamaConfig as TransformersConfig

    return TransformersConfig.from_dict(config.to_hf() | {"use_cache": False})


def with_liger(model: Any) -> Any:
    """Liger's kernels in this one model: norms, MLPs, and the loss fused with the last projection.

    Its rotary embedding is left out: it would replace transformers' for every model of the process.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    theirs = dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(rope=False, model=model)
    vars(modeling_llama).update(theirs)  # undo what would concern models that are made later
    return model


def in_peft(base: Llama) -> Any:
    """PEFT's adaption prompts on transformers' model."""
    from peft import AdaptionPromptConfig, get_peft_model

    layers = base.config.num_layers - unadapted_layers(base.config)
    config = AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=layers, task_type="CAUSAL_LM")
    return gates_set(get_peft_model(in_transformers(base), config), "adaption_gate")


def in_peft_accelerated(base: Llama) -> Any:
    """The same model with this package's attention."""
    from zinit_kernels.integrations.peft import accelerate

    return accelerate(in_peft(base))


def in_lora(base: Llama, rank: int, liger: bool = False) -> Any:
    """LoRA on the query and value projections, as in the paper's comparison."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = in_transformers(base)
    # in the base's dtype, as PEFT's adaption prompts are; by default PEFT makes LoRA's matrices float32
    return get_peft_model(with_liger(model) if liger else model, config, autocast_adapter_dtype=False)


def in_litgpt(base: Llama) -> Any:
    """litgpt's adapter. Its query, key and value weights are one tensor, so they are copies."""
    from litgpt import adapter

    config = base.config
    with torch.device("meta"):
        model = adapter.GPT(
            adapter.Config(
                block_size=config.max_seq_len, padded_vocab_size=config.vocab_size, n_layer=config.num_layers,
                n_head=config.num_heads_q, n_query_groups=config.num_heads_kv, n_embd=config.hidden_size,
                head_size=config.head_dim, intermediate_size=config.intermediate_size, norm_eps=config.norm_eps,
                rope_base=int(config.rope_theta), rotary_percentage=1.0, bias=False, norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP", parallel_residual=False, adapter_prompt_length=PROMPTS,
                adapter_start_layer=unadapted_layers(config),
            )
        )  # fmt: skip
    model.load_state_dict(litgpt_weights(base), assign=True, strict=False)
    with torch.device(base.device):
        model.cos, model.sin = model.rope_cache(device=base.device)
        for layer in model.transformer.h[unadapted_layers(config) :]:
            layer.attn.adapter_wte = nn.Embedding(PROMPTS, config.hidden_size, dtype=base.dtype)
            layer.attn.gating_factor = nn.Parameter(
                torch.zeros(1, 1, config.num_heads_q, 1, dtype=base.dtype)
            )
    adapter.mark_only_adapter_as_trainable(model)
    return gates_set(model, "gating_factor")


def litgpt_weights(base: Llama) -> dict[str, torch.Tensor]:
    """The base's weights under litgpt's names."""
    ours = base.state_dict()
    found = {
        "lm_head.weight": base.output_weight,
        "transformer.wte.weight": ours["embed_tokens.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
    }
    names = {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    }  # fmt: skip
    for layer in range(base.config.num_layers):
        here, there = f"layers.{layer}", f"transformer.h.{layer}"
        found |= {f"{there}.{theirs}.weight": ours[f"{here}.{mine}.weight"] for theirs, mine in names.items()}
        parts = [ours[f"{here}.self_attn.{name}_proj.weight"] for name in "qkv"]
        found[f"{there}.attn.qkv.weight"] = torch.cat(parts)
    return found


def gates_set(model: Any, name: str) -> Any:
    """The model with GATE_VALUE in every parameter whose name ends with `name`."""
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(name):
            nn.init.constant_(parameter, GATE_VALUE)
    return model


def forget_projected_prompts(model: Any) -> None:
    """litgpt keeps the prompts of its first pass with their graph; without this a second training step raises."""
    for layer in model.transformer.h:
        layer.attn.adapter_kv_cache = None


Loss = Callable[[Tensor], Tensor]  # of tokens [B, T]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. `build` returns the trainable parameters and the loss of tokens [B, T]."""

    name: str
    build: Callable[[Llama], tuple[list[nn.Parameter], Loss]]
    needs: tuple[str, ...] = ()
    on_gpu_only: bool = False
    copies: bool = False  # it writes to the weights, so it has its own

    def why_not(self, device: torch.device) -> str:
        if reason := why_missing(*self.needs):
            return reason
        return "its kernels need a GPU" if self.on_gpu_only and device.type == "cpu" else ""


def our_adapter(base: Llama) -> LlamaAdapter:
    """The paper's adapter, with gates away from zero."""
    layers = base.config.num_layers - unadapted_layers(base.config)
    adapter = LlamaAdapter(base.config, AdapterConfig(prompt_length=PROMPTS, num_layers=layers)).to(
        base.device
    )
    nn.init.constant_(adapter.gates, GATE_VALUE)
    return adapter


def with_our_adapter(base: Llama) -> tuple[list[nn.Parameter], Loss]:
    adapter = our_adapter(base)

    def loss(tokens: Tensor) -> Tensor:
        hidden = base.hidden_states(tokens, adapter)
        return answer_loss(hidden[:, :-1], tokens[:, 1:], base.output_weight)

    return list(adapter.parameters()), loss


def by_its_own_loss(make: Callable[[Llama], Any], base: Llama) -> tuple[list[nn.Parameter], Loss]:
    """For transformers' models, which compute the loss themselves."""
    model = make(base)
    return trainable(model), lambda tokens: model(input_ids=tokens, labels=tokens).loss


def with_litgpt(base: Llama) -> tuple[list[nn.Parameter], Loss]:
    model = in_litgpt(base)

    def loss(tokens: Tensor) -> Tensor:
        forget_projected_prompts(model)
        logits = model(tokens)[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return trainable(model), loss


def with_everything(base: Llama) -> Any:
    """transformers' model on a copy of the weights, all of them trained."""
    model = in_transformers(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.requires_grad_(True)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def why_wrong(method: Method, dtype: torch.dtype, device: torch.device) -> str:
    """Why a method's loss or gradients are wrong on a tiny base; "" if they are right.

    With its own parameters at zero its loss must be the base's (in float64); as it was built, another one; and every
    parameter must get a gradient.
    """
    base = random_base(TINY, dtype, device)
    tokens = torch.randint(TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    exact = copy.deepcopy(base).double()
    expected = answer_loss(exact.hidden_states(tokens)[:, :-1], tokens[:, 1:], exact.output_weight).item()
    try:
        parameters, loss_of = method.build(base)
        for parameter in parameters:
            if not parameter.any():  # LoRA's second matrices start at zero
                nn.init.constant_(parameter, GATE_VALUE)
        loss = loss_of(tokens)
        loss.backward()
        idle = sum(p.grad is None or not p.grad.isfinite().all() or not p.grad.any() for p in parameters)
        if idle:
            return f"{idle} of {len(parameters)} parameters get no gradient"
        if not method.copies:
            if abs(loss.item() - expected) < 1e-6 * expected:
                return "its parameters change nothing"
            for parameter in parameters:
                parameter.data.zero_()
            with torch.no_grad():
                loss = loss_of(tokens)
    except Exception as error:  # any: what raises gets no figure, and the others go on
        return why_failed(error)
    if not abs(loss.item() - expected) <= ROUNDING[dtype] * expected:
        return f"wrong result: loss {loss.item():.6g}, in float64 {expected:.6g}"
    return ""


def lora(rank: int, liger: bool = False) -> Method:
    name = f"LoRA r = {rank}{', Liger' if liger else ''}"
    make = partial(in_lora, rank=rank, liger=liger)
    needs = (*NEEDS_PEFT, *(("liger_kernel",) if liger else ()))
    return Method(name, partial(by_its_own_loss, make), needs, on_gpu_only=liger)


METHODS = (
    Method(ADAPTER, with_our_adapter),
    Method(ACCELERATED, partial(by_its_own_loss, in_peft_accelerated), NEEDS_PEFT),
    Method(PEFT, partial(by_its_own_loss, in_peft), NEEDS_PEFT),
    Method(LITGPT, with_litgpt, ("litgpt",)),
    *(lora(rank) for rank in LORA_RANKS),
    lora(8, liger=True),
    Method("full fine-tuning", partial(by_its_own_loss, with_everything), NEEDS_HF, copies=True),
)
