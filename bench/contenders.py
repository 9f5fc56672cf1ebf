"""Ways to fine-tune the same frozen random weights: this project's adapter, PEFT's, litgpt's, LoRA, everything.

The weights are shared, not copied, except where full fine-tuning writes to them.
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

from .conditions import why_failed, why_missing
from .peers import (
    GATE,
    UNADAPTED_LAYERS,
    forget_projected_prompts,
    in_litgpt,
    in_lora,
    in_peft,
    in_peft_accelerated,
    in_transformers,
)
from .shapes import PROMPTS

LORA_RANKS = (2, 4, 8, 16, 32)

# The 7B's proportions: an eighth of its width, all of its 32 layers, 30 of them adapted; 105 million parameters.
EIGHTH = LlamaConfig(4000, 512, 1376, num_layers=32, num_heads_q=4, num_heads_kv=4, head_dim=128)
SEVEN_BILLION = LlamaConfig(32000, 4096, 11008, num_layers=32, num_heads_q=32, num_heads_kv=32, head_dim=128)
THREE_BILLION = LlamaConfig(
    128256, 3072, 8192, num_layers=28, num_heads_q=24, num_heads_kv=8, head_dim=128, rope_theta=500000.0
)
TINY = LlamaConfig(256, 64, 172, num_layers=4, num_heads_q=2, num_heads_kv=2, head_dim=32)

Loss = Callable[[Tensor], Tensor]  # of tokens [B, T]
# A loss in half precision, and one without any rounding, may differ by this much of its value.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Contender:
    """A way to fine-tune: `build` gives the trainable parameters and the loss of tokens [B, T]."""

    name: str
    build: Callable[[Llama], tuple[list[nn.Parameter], Loss]]
    needs: tuple[str, ...] = ()
    on_gpu_only: bool = False
    copies: bool = False  # has weights of its own: writes to them

    def why_not(self, device: torch.device) -> str:
        if reason := why_missing(*self.needs):
            return reason
        return "its kernels need a GPU" if self.on_gpu_only and device.type == "cpu" else ""


def random_base(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """A frozen LLaMA of random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(config).to(dtype)
    return model.initialise().freeze()


def our_adapter(base: Llama) -> LlamaAdapter:
    """The paper's setting, gates away from zero so that nothing is skipped."""
    layers = base.config.num_layers - UNADAPTED_LAYERS
    adapter = LlamaAdapter(base.config, AdapterConfig(prompt_length=PROMPTS, num_layers=layers)).to(
        base.device
    )
    nn.init.constant_(adapter.gates, GATE)
    return adapter


def with_our_adapter(base: Llama) -> tuple[list[nn.Parameter], Loss]:
    adapter = our_adapter(base)

    def loss(tokens: Tensor) -> Tensor:
        hidden = base.hidden_states(tokens, adapter)
        return answer_loss(hidden[:, :-1], tokens[:, 1:], base.output_weight)

    return list(adapter.parameters()), loss


def by_its_own_loss(make: Callable[[Llama], Any], base: Llama) -> tuple[list[nn.Parameter], Loss]:
    """For transformers' models, which compute the loss of the tokens that follow."""
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


def why_wrong(contender: Contender, dtype: torch.dtype, device: torch.device) -> str:
    """ "" where a small sibling does what fine-tuning must: with its own parameters at zero its loss is the base's in
    float64, as it was built (gates away from zero) another one, and every parameter gets a gradient."""
    base = random_base(TINY, dtype, device)
    tokens = torch.randint(TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    exact = copy.deepcopy(base).double()
    expected = answer_loss(exact.hidden_states(tokens)[:, :-1], tokens[:, 1:], exact.output_weight).item()
    try:
        parameters, loss_of = contender.build(base)
        for parameter in parameters:
            if not parameter.any():  # LoRA's second matrices start there
                nn.init.constant_(parameter, GATE)
        loss = loss_of(tokens)
        loss.backward()
        idle = sum(p.grad is None or not p.grad.isfinite().all() or not p.grad.any() for p in parameters)
        if idle:
            return f"{idle} of {len(parameters)} parameters get no gradient"
        if not contender.copies:
            if abs(loss.item() - expected) < 1e-6 * expected:
                return "its parameters change nothing"
            for parameter in parameters:
                parameter.data.zero_()
            with torch.no_grad():
                loss = loss_of(tokens)
    except Exception as error:  # any: what raises is red, and the others go on
        return why_failed(error)
    if not abs(loss.item() - expected) <= ROUNDING[dtype] * expected:
        return f"wrong result: loss {loss.item():.6g}, in float64 {expected:.6g}"
    return ""


OURS, PEFT = "zinit adapter", "PEFT adaption prompt"
ACCELERATED = f"{PEFT}, accelerated"
HF, BOTH = ("transformers",), ("transformers", "peft")


def lora(rank: int, liger: bool = False) -> Contender:
    name = f"LoRA r = {rank}{', Liger' if liger else ''}"
    make = partial(in_lora, rank=rank, liger=liger)
    needs = (*BOTH, *(("liger_kernel",) if liger else ()))
    return Contender(name, partial(by_its_own_loss, make), needs, on_gpu_only=liger)


CONTENDERS = (
    Contender(OURS, with_our_adapter),
    Contender(ACCELERATED, partial(by_its_own_loss, in_peft_accelerated), BOTH),
    Contender(PEFT, partial(by_its_own_loss, in_peft), BOTH),
    Contender("litgpt adapter", with_litgpt, ("litgpt",)),
    *(lora(rank) for rank in LORA_RANKS),
    lora(8, liger=True),
    Contender("full fine-tuning", partial(by_its_own_loss, with_everything), HF, copies=True),
)
