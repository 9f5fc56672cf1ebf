"""Ways to adapt a frozen transformers model, each with the parameters that it trains."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import nn

from zinit_kernels.integrations.layers import attention_layers
from zinit_kernels.integrations.transformers import add_zero_init_attention, parameter_groups

from ..shared import UserError
from .one_softmax import add_one_softmax_prompts

ABOUT = {
    "frozen": "the model as it is, where a task needs no head",
    "head": "the frozen model with a trained head",
    "bias": "all biases",
    "one-softmax": "prompts in the softmax of the tokens, without a gate (VPT, P-tuning v2)",
    "random-gates": "zero-init prompts, but with gates drawn from N(0, 1)",
    "lora": "low-rank updates of queries and values; lora-4 is rank 4",
    "zero-init": "zero-init prompts",
}
# Learning rates to choose among on the validation data
LEARNING_RATES = {
    "frozen": (0.0,),
    "head": (3e-2, 1e-2, 3e-3),
    "bias": (1e-2, 3e-3, 1e-3),
    "one-softmax": (1e-1, 3e-2, 9e-3),
    "random-gates": (1e-1, 3e-2, 9e-3),
    "lora": (3e-3, 1e-3, 3e-4),
    "zero-init": (1e-1, 3e-2, 9e-3),
}
DEFAULT_RANK = 8
_QUERY, _VALUE = ("q_proj", "query", "c_attn", "qkv_proj"), ("v_proj", "value")


class Size(NamedTuple):
    """Of the prompts."""

    prompt_length: int = 10
    num_layers: int = 30


def split_name(method: str) -> tuple[str, int]:
    """("lora", 4) of "lora-4". Raises UserError for an unknown method."""
    found = re.fullmatch(r"lora-([1-9]\d{0,3})", method)
    if found:
        return "lora", int(found[1])
    if method not in ABOUT:
        raise UserError(f"there is no method {method!r}; there are {', '.join(ABOUT)}, and lora-RANK.")
    return method, DEFAULT_RANK


def head_of(model: Any) -> list[nn.Parameter]:
    """The parameters outside the base model: the classifier that a task brings. None of a model without a head."""
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in base]


def adapt(
    model: Any,
    method: str,
    size: Size,
    learning_rate: float,
    head_learning_rate: float,
    with_head: bool = True,
) -> list[dict[str, Any]]:
    """Prepares the model in place, and returns the parameter groups for an optimizer; all else is frozen.

    What is random is drawn from torch's global generator. Dropout stays off: the model is left in eval mode.

    Args:
        with_head: train what is outside the base model too.
        learning_rate: of the method's own parameters; of the head, if the method is "head".

    Raises:
        UserError: an architecture that has no row, or a model without anything that the method trains.
    """
    kind, rank = split_name(method)
    head = head_of(model) if with_head else []
    model.eval().requires_grad_(False)
    groups: list[dict[str, Any]] = []
    try:
        if kind in ("zero-init", "random-gates"):
            add_zero_init_attention(model, size.prompt_length, size.num_layers)
            if kind == "random-gates":
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if name.endswith("zinit.gate"):
                            parameter.normal_()
            groups = parameter_groups(model, learning_rate)
        elif kind == "one-softmax":
            prompts = add_one_softmax_prompts(model, size.prompt_length, size.num_layers)
            groups = [{"params": prompts, "lr": learning_rate, "weight_decay": 0.02}]
        elif kind == "lora":
            from peft import LoraConfig, inject_adapter_in_model  # seconds, which --help need not wait for

            config = LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=_lora_targets(model), lora_dropout=0.0
            )
            inject_adapter_in_model(config, model)
            own = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
            groups = [{"params": own, "lr": learning_rate, "weight_decay": 0.0}]
        elif kind == "bias":
            known = {id(parameter) for parameter in head}
            own = [p for name, p in model.named_parameters() if name.endswith("bias") and id(p) not in known]
            if not own:
                raise ValueError(f"{type(model).__name__} has no biases")
            groups = [{"params": own, "lr": learning_rate, "weight_decay": 0.0}]
    except ValueError as error:
        raise UserError(f"{method}: {error}.") from error
    if head and kind != "frozen":
        rate = learning_rate if kind == "head" else head_learning_rate
        groups.append({"params": head, "lr": rate, "weight_decay": 0.01})
    if kind == "frozen" and not head:
        return []
    if kind == "frozen" or not groups:
        raise UserError(
            f"{method}: {type(model).__name__} has nothing that this method trains: take another one."
        )
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return groups


def _lora_targets(model: nn.Module) -> list[str]:
    """The names of the query and value projections of every attention layer."""
    found = []
    for layer in attention_layers(model):
        for names in (_QUERY, _VALUE):
            found += [f"{layer.name}.{part}" for part in names if part in layer.attention._modules][:1]
    return found


def trained_numbers(groups: list[dict[str, Any]]) -> int:
    """How many numbers the groups train."""
    return sum(parameter.numel() for group in groups for parameter in group["params"])
