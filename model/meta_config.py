"""params.json of Meta's LLaMA releases.

The file leaves out facts that Meta's programs have built in. They come from the release that the file's sizes tell. A
fact that the sizes do not tell is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from zinit_kernels.console import shown

from .errors import UserError
from .fields import flag, number, refuse_unknown
from .rope_scaling import RopeScaling

LLAMA3_VOCAB_SIZE = 128256  # of Llama 3, 3.1, 3.2 and 3.3; LLaMA 1 and 2 have 32000, Code Llama up to 32016
_LLAMA3_BOS, _LLAMA3_EOS = 128000, (128001, 128008, 128009)
# (dim, n_layers) of the releases with use_scaled_rope -> by what their longest wavelengths are stretched
_SCALED_RELEASES = {
    (4096, 32): 8.0,  # Llama 3.1 8B
    (8192, 80): 8.0,  # Llama 3.1 and 3.3 70B
    (16384, 126): 8.0,  # Llama 3.1 405B
    (2048, 16): 32.0,  # Llama 3.2 1B
    (3072, 28): 32.0,  # Llama 3.2 3B
}
_READ = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "high_freq_factor", "rope_high_freq_factor",
    "max_seq_len",
)  # fmt: skip
# How much is computed at once, and numbers of parts that are switched off
_HARMLESS = ("max_batch_size", "vision_max_num_chunks", "floor_scale", "attn_scale")


def read_meta_config(params: Mapping[str, Any], vocab_size: int, tie_embeddings: bool) -> dict[str, Any]:
    """`LlamaConfig`'s fields from a parsed params.json.

    vocab_size: the rows of the embedding, because LLaMA 1 and 2 write -1 in the file. Raises UserError.
    """
    file = "params.json"
    if (
        params.get("moe_args")
        or params.get("vision_args")
        or params.get("vision_chunk_size", -1) not in (-1, 0, None)
    ):
        raise UserError(
            "params.json describes a mixture of experts or a vision model, only the dense text LLaMAs are supported."
        )
    if params.get("quantization_args"):
        raise UserError(
            "params.json describes quantised weights (quantization_args), which are not supported."
        )
    refuse_unknown(params, file, (*_READ, *_HARMLESS), off=(None, False, 0, -1))
    read = partial(number, params, file)
    hidden_size, num_layers, num_heads_q = read("dim", int), read("n_layers", int), read("n_heads", int)
    if params.get("vocab_size") not in (None, -1, vocab_size):
        raise UserError(
            f"params.json says vocab_size {shown(params['vocab_size'])}, tok_embeddings.weight has {vocab_size} rows."
        )
    is_llama3 = vocab_size >= LLAMA3_VOCAB_SIZE  # more rows: tokens were added to it
    scaling = _rope_scaling(params, (hidden_size, num_layers))
    rope_theta = read("rope_theta", float, 500000.0 if is_llama3 else 10000.0)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": _intermediate_size(params, hidden_size),
        "num_layers": num_layers,
        "num_heads_q": num_heads_q,
        "num_heads_kv": read("n_kv_heads", int, num_heads_q),
        "head_dim": read("head_dim", int, hidden_size // num_heads_q),
        "norm_eps": read("norm_eps", float, 1e-5),
        "rope_theta": rope_theta,
        "rope_scaling": scaling,
        "max_seq_len": read("max_seq_len", int, _context(scaling, is_llama3, rope_theta)),
        "tie_embeddings": tie_embeddings,
        "bos_id": _LLAMA3_BOS if is_llama3 else 1,
        "eos_ids": _LLAMA3_EOS if is_llama3 else (2,),
    }


def _rope_scaling(params: Mapping[str, Any], release: tuple[int, int]) -> RopeScaling | None:
    told = params.get("rope_scaling_factor") is not None
    if not flag(params, "params.json", "use_scaled_rope"):
        if told and params.get("use_scaled_rope") is None:
            raise UserError(
                "params.json has a rope_scaling_factor and no use_scaled_rope: add true or false."
            )
        return None
    if not told and release not in _SCALED_RELEASES:
        raise UserError(
            "params.json says use_scaled_rope and not by which factor, and dim {} with {} layers is none of Meta's "
            "releases: add rope_scaling_factor (8 in Llama 3.1, 32 in Llama 3.2).".format(*release)
        )
    read = partial(number, params, "params.json")
    high = read("rope_high_freq_factor", float, read("high_freq_factor", float, 4.0))
    if high <= 1:
        raise UserError(f"params.json must have a high_freq_factor above 1, it has {high}.")
    factor = read("rope_scaling_factor", float, _SCALED_RELEASES.get(release))
    return RopeScaling("llama3", factor, high_freq_factor=high)


def _context(scaling: RopeScaling | None, is_llama3: bool, rope_theta: float) -> int:
    """The number of tokens that the model was trained for.

    LLaMA 2's file looks like LLaMA 1's, whose context is half as long: the shorter one is assumed.
    """
    if scaling is not None:
        return 131072
    if is_llama3:
        return 8192
    return 16384 if rope_theta > 10000 else 2048  # Code Llama


def _intermediate_size(params: Mapping[str, Any], hidden_size: int) -> int:
    read = partial(number, params, "params.json")
    size = int(8 * hidden_size / 3)
    if params.get("ffn_dim_multiplier") is not None:
        size = int(read("ffn_dim_multiplier", float) * size)
    multiple = read("multiple_of", int, 256)
    return (size + multiple - 1) // multiple * multiple
