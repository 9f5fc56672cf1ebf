"""How each architecture's attention module makes keys and values: one row of data for each class of transformers.

Prompts take the same way as hidden states, key norm included, but for the rotary embedding. A class without a row is
refused, because a missing step (a norm, a clamp) would change the numbers without an error; the message then shows the
row that the module's own submodules suggest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class Projection(NamedTuple):
    """How an attention module turns hidden states into keys and values.

    Args:
        key_value: hidden states [..., C] -> keys and values, each [..., Hkv * D].
        modules: the names of the submodules that `key_value` calls.
        key_norm: the name of the submodule that normalises the keys, if there is one; it may be absent from a module
            whose configuration switches it off.
        norm_of: what `key_norm` takes: "head", keys [..., Hkv, D], or "width", keys [..., Hkv * D].
    """

    key_value: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    modules: tuple[str, ...]
    key_norm: str | None = None
    norm_of: str = "head"


def split_key_value(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return attention.k_proj(hidden), attention.v_proj(hidden)


def _encoder_key_value(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return attention.key(hidden), attention.value(hidden)


def _gpt2_key_value(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    _, key, value = attention.c_attn(hidden).split(attention.split_size, dim=-1)
    return key, value


def _phi3_key_value(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    width = attention.num_key_value_heads * attention.head_dim
    queries = attention.config.num_attention_heads * attention.head_dim
    _, key, value = attention.qkv_proj(hidden).split([queries, width, width], dim=-1)
    return key, value


SPLIT = Projection(split_key_value, ("k_proj", "v_proj"))
NORMED = SPLIT._replace(key_norm="k_norm")  # every head by itself
ENCODER = Projection(_encoder_key_value, ("key", "value"))

# The name of an attention class of transformers -> its row.
ARCHITECTURES: dict[str, Projection] = {
    "LlamaAttention": SPLIT,
    "MistralAttention": SPLIT,
    "MixtralAttention": SPLIT,
    "Qwen2Attention": SPLIT,
    "Qwen3Attention": NORMED,
    "Qwen3MoeAttention": NORMED,
    "Gemma2Attention": SPLIT,
    "Gemma3Attention": NORMED,
    "Phi3Attention": Projection(_phi3_key_value, ("qkv_proj",)),
    "GraniteAttention": SPLIT,
    "Starcoder2Attention": SPLIT,
    "SmolLM3Attention": SPLIT,
    "Olmo2Attention": NORMED._replace(norm_of="width"),
    "CohereAttention": NORMED,  # where use_qk_norm is set
    "GptOssAttention": SPLIT,  # attention sinks, which are the tokens' alone
    "GPT2Attention": Projection(_gpt2_key_value, ("c_attn",)),
    "BertSelfAttention": ENCODER,
    "RobertaSelfAttention": ENCODER,
    "ViTAttention": SPLIT,
    "ViTSelfAttention": ENCODER,  # the same layer before transformers 5
    "Dinov2Attention": SPLIT,
    "Dinov2SelfAttention": ENCODER,  # the same layer before transformers 5
    "CLIPAttention": SPLIT,
    "SiglipAttention": SPLIT,
}

# Those that folders of save_adapter knew from the beginning. A folder names every stack of layers of its model, those
# without prompts too, but none that had no row when it was written.
FIRST_ARCHITECTURES = {
    "LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Gemma2Attention", "Gemma3Attention",
    "Phi3Attention", "GPT2Attention", "BertSelfAttention", "RobertaSelfAttention", "ViTAttention", "ViTSelfAttention",
    "CLIPAttention",
}  # fmt: skip


def architecture_of(module: nn.Module) -> tuple[type[nn.Module], Projection] | None:
    """The transformers class of an attention module and its row, or None.

    A base of the module's class counts too, unless a class in front of it has another forward: FSDP2 and
    parametrisations derive a class of their own from the module's.
    """
    for kind in type(module).__mro__:
        if kind.__name__ in ARCHITECTURES:
            return kind, ARCHITECTURES[kind.__name__]
        if "forward" in vars(kind):
            return None
    return None


def is_adaptable(module: nn.Module) -> bool:
    """Whether this is self-attention of a known architecture."""
    found = architecture_of(module)
    if found is None or getattr(module, "is_cross_attention", False):
        return False
    return all(part in module._modules for part in found[1].modules)


def missing_row(model: nn.Module) -> str:
    """What to say of a model without any attention that has a row: the row to write, where it can be guessed."""
    head = (
        f"{type(model).__name__} has no attention of a known architecture ({', '.join(ARCHITECTURES)}); a row in "
        "zinit_kernels.integrations.transformers.ARCHITECTURES adds one"
    )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{head}, but not for an encoder-decoder model, whose cross-attention is of the same class"
    for module in model.modules():
        name = type(module).__name__
        if "ALL_ATTENTION_FUNCTIONS" not in _source(type(module)) or not _has_key_projection(module):
            continue
        norm = next((part for part in _NORMS if part in module._modules), None)
        if norm is not None and not isinstance(getattr(module._modules[norm], "weight", None), nn.Parameter):
            return f"{head}, but not for {name}: no row describes its {norm}, {type(module._modules[norm]).__name__}"
        return (
            f"{head}. By the names of its submodules, {name} needs the following one. Compare it with what "
            f"{name}.forward does to its keys and values before the rotary embedding, then run it before "
            f"add_zero_init_attention:\n\nfrom {__name__} import ARCHITECTURES, Projection, split_key_value\n"
            f"{_guess(module, norm)}"
        )
    return f"{head}, if it takes its attention from transformers' AttentionInterface, which none of its modules does"


_PAIRS = (("k_proj", "v_proj"), ("key", "value"), ("key_proj", "value_proj"), ("k_lin", "v_lin"), ("k", "v"))
_FUSED = ("qkv_proj", "query_key_value", "qkv", "Wqkv", "c_attn", "in_proj")
_NORMS = ("k_norm", "key_norm", "k_layernorm", "key_layernorm", "norm_k")


def _has_key_projection(attention: nn.Module) -> bool:
    parts = attention._modules.keys()
    return any(set(pair) <= parts for pair in _PAIRS) or any(part in parts for part in _FUSED)


def _guess(attention: nn.Module, norm: str | None) -> str:
    """The row in lines of Python."""
    parts, name = attention._modules, type(attention).__name__
    pair = next((pair for pair in _PAIRS if set(pair) <= parts.keys()), None)
    fused = next((part for part in _FUSED if part in parts), "")
    modules: tuple[str, ...] = pair or (fused,)
    definition, function = "", "key_value"
    if pair is None:
        definition = (
            f"def key_value(attention, hidden):  # if the rows of {fused} are queries, keys, values, as many of each\n"
            f"    _, key, value = attention.{fused}(hidden).chunk(3, dim=-1)\n    return key, value\n"
        )
    elif pair == _PAIRS[0]:
        function = "split_key_value"
    else:
        definition = (
            "def key_value(attention, hidden):\n"
            f"    return attention.{pair[0]}(hidden), attention.{pair[1]}(hidden)\n"
        )
    return f'{definition}ARCHITECTURES["{name}"] = Projection({function}, {modules}{_norm_arguments(attention, norm)})'


def _norm_arguments(attention: nn.Module, norm: str | None) -> str:
    if norm is None:
        return ""
    weight = getattr(attention._modules[norm], "weight", None)
    width = getattr(attention._modules.get("k_proj"), "out_features", None)
    of = "width" if weight is not None and tuple(weight.shape) == (width,) else "head"
    return f', key_norm="{norm}", norm_of="{of}"'


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
