"""Many tokens of cached sequences: the CPU kernels are handed the model once, and a token takes one call.

Between two tokens the weights go through every cache of the processor, and push out whatever Python and torch need to
hand them over. So asking 30 layers for their weights, hooks and prompts takes 0.02 ms when it is repeated at once, and
0.9 ms between tokens: a quarter of what a token of SmolLM2 takes at 4 bits. A generation asks once.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from zinit_kernels import operators
from zinit_kernels.packed import NATIVE, Packed, PackedEmbedding, PackedLinear

from .decoding import Decoder, Prompts
from .layer_weights import MOST_TOKENS
from .llama import Adapter, KVCache, Llama, PagedCache, PagedRows

_KEEP, _DECODE, _DROP = (
    operators.operator(stage, "cpu") for stage in ("keep_layers", "decode_kept", "drop_layers")
)


class KeptLayers:
    """A model, the prompts of an adapter and a cache, as the kernels hold them. Nothing of them may change."""

    def __init__(self, model: Llama, decoder: Decoder, prompts: Prompts, cache: KVCache | PagedCache):
        config = model.config
        embedding, head = (_weight(module) for module in (model.embed_tokens, model.head))
        self._decoder = decoder
        self._ends = [(weight, weight.data_ptr()) for weight in _ends(model)]
        self._cache, self._index = cache, prompts.index
        self._places = [(tensor, tensor.data_ptr()) for tensor in (embedding[0], decoder.norm, head[0])]
        self._number: int = _KEEP(
            decoder.weights, decoder.schemes, decoder.norm, config.norm_eps, config.num_heads_q, config.num_heads_kv,
            config.intermediate_size, cache.keys, cache.values, cache.cos, cache.sin, prompts.tensors, prompts.layers,
            config.head_dim**-0.5, config.window_left, prompts.tanh, *embedding, *head,
            config.vocab_size,
        )  # fmt: skip
        weakref.finalize(self, _DROP, self._number)

    def is_in_place(self) -> bool:
        """Whether the first and the last weights still have the memory that the kernels read: `model.share_memory()`
        moves all weights, and frees what they had. Asking for every weight would take 0.9 ms."""
        return all(tensor.data_ptr() == address for tensor, address in self._places)

    def is_of(self, model: Llama, decoder: Decoder) -> bool:
        """Whether the model has the weights that were kept. decoder: what `Decoder.of` says of it now."""
        ends = zip(_ends(model), self._ends, strict=True)
        return (
            decoder is self._decoder
            and self.is_in_place()
            and all(weight is kept and weight.data_ptr() == address for weight, (kept, address) in ends)
        )

    def read(
        self, tokens: Tensor, rows: PagedRows | None = None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reads the next tokens [B, T], at most 32 in all. Returns the logits [B * T, vocab_size] behind each, and the
        first of each row's largest, int64 [B * T]: -1 where that is no finite number.

        rows, index: of a cache of pages, whose the tokens are, and each row's prompts, int32 [B].
        """
        if rows is None:
            assert isinstance(self._cache, KVCache)
            logits, likeliest = _DECODE(self._number, tokens, self._cache.lengths, None, self._index)
        else:
            logits, likeliest = _DECODE(self._number, tokens, rows.lengths, rows.block_table, index)
        return logits, likeliest


def keep(
    model: Llama, adapter: Adapter | None, cache: KVCache | PagedCache, kept: KeptLayers | None = None
) -> KeptLayers | None:
    """The model, for one generation or for all sequences of a cache of pages; None where only calling it can tell what
    it computes: with hooks, on another device, or with an adapter that does not promise the same prompts for every
    token (`keeps_prompts`).

    kept: what an earlier call with this cache and the tensors of this adapter returned. It is returned again while the
    model has the weights that it had.
    """
    if (
        not NATIVE
        or type(model) is not Llama
        or {"hidden_states", "logits"} & vars(model).keys()
        or model.device.type != "cpu"
        or (isinstance(cache, KVCache) and len(cache.lengths) > MOST_TOKENS)
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or cache.keys.dtype != model.dtype
        or not (adapter is None or getattr(adapter, "keeps_prompts", False))
        or not all(_is_plain(module, model.dtype) for module in (model.embed_tokens, model.head))
    ):
        return None
    decoder = Decoder.of(model, cache)
    if not decoder.usable or decoder.is_hooked():
        return None
    if kept is not None and kept.is_of(model, decoder):
        return kept
    prompts = decoder.prompts(model, adapter)
    return None if prompts is None else KeptLayers(model, decoder, prompts, cache)


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether an embedding or a head is its weight alone."""
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    if type(module) in (PackedEmbedding, PackedLinear):
        return module.dtype == dtype and module.weight.is_contiguous()
    if type(module) is nn.Embedding:
        known = module.max_norm is None
    else:
        known = type(module) is nn.Linear and module.bias is None
    weight = module.weight
    return known and type(weight) is nn.Parameter and weight.dtype == dtype and weight.is_contiguous()


def _ends(model: Llama) -> tuple[Tensor, Tensor]:
    """The weights of the embedding and the head."""
    return model.embed_tokens.weight, model.head.weight


def _weight(module: nn.Module) -> tuple[Tensor, int]:
    """The weight of an embedding or a head, and its scheme."""
    scheme = module.scheme.number if isinstance(module, Packed) else 0
    return module.weight.detach(), scheme
