"""Fused zero-initialised attention (LLaMA-Adapter, arXiv 2303.16199): both softmaxes in one fused kernel."""

from .api import (
    explain,
    prompt_attention_,
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)
from .flops import register_when_imported as _register_flop_formulas

_register_flop_formulas()

__version__ = "0.1.0"

__all__ = [
    "explain",
    "prompt_attention_",
    "zero_init_attention",
    "zero_init_attention_varlen",
    "zero_init_attention_with_kvcache",
]
