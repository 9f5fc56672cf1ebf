"""The LLaMA transformer (1, 2, 3.x and Mistral), for training and for decoding. Attention is called in one place,
`Attention.attend`.

Tokens come in one of three layouts:

    [B, T]                    sequences from position 0, padded on the right: causality hides the padding
    [total] + cu_seqlens      sequences packed one after the other; positions restart at each
    [B, T] + a cache          the next T tokens of each cached sequence; in a paged cache, of each row

B sequences, T tokens, C hidden size, Hq / Hkv heads, D head_dim. Parameter names are Hugging Face's without
"model.".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zinit_kernels import (
    packed,
    zero_init_attention,
    zero_init_attention_varlen,
    zero_init_attention_with_kvcache,
)

from .config import LlamaConfig
from .decoding import decode, prefill
from .device_layers import decode as decode_on_device
from .layer_weights import LayerWeights
from .layers import RMSNorm, Rotary, SwiGLU, prepend, rotary_table


class Prompt(NamedTuple):
    """What an adapter adds to one layer's attention.

    All sequences share one set of prompts, or each takes a row of a table of N sets.
    """

    key: Tensor  # [P, Hkv, D] or [N, P, Hkv, D], not rotated
    value: Tensor  # as the key
    gate: Tensor | None  # [Hq], raw; None: the prompts join the tokens' softmax (packed tokens, one set only)
    gate_activation: str
    index: Tensor | None = None  # int32 [B]: each sequence's row of the table


class KVCache:
    """Keys and values of B sequences of up to `capacity` tokens, for every layer.

    The shape is [B, capacity, Hkv, D]; in memory the heads come first, from which a CPU decodes 1.2 to 1.75 times as
    fast.
    """

    block_table = slots = None  # it has no pages

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (config.num_layers, batch_size, config.num_heads_kv, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3)
        self.values = torch.zeros(shape, dtype=dtype, device=device).transpose(2, 3)
        # tokens each sequence has in the cache
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.cos, self.sin = rotary_table(config, torch.arange(capacity, device=device))
        # of the model that last decoded with this cache
        self.decoder: tuple[nn.Module, LayerWeights] | None = None

    def select(self, sequences: list[int]) -> KVCache:
        """A cache of these sequences only."""
        chosen = copy.copy(self)
        index = torch.tensor(sequences, device=self.lengths.device)
        chosen.keys, chosen.values = (
            c.transpose(2, 3)[:, index].transpose(2, 3) for c in (self.keys, self.values)
        )
        chosen.lengths = self.lengths[index]
        return chosen


class PagedCache:
    """Keys and values of every layer in pages, for sequences of up to `positions` tokens. Whose a page is, the owner
    knows.

    The shape is [num_pages, page_size, Hkv, D]; in memory the heads of a page come first, as in `KVCache`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_pages: int,
        page_size: int,
        positions: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (config.num_layers, num_pages, config.num_heads_kv, page_size, config.head_dim)
        # what no token was written to is not read
        self.keys, self.values = (
            torch.empty(shape, dtype=dtype, device=device).transpose(2, 3) for _ in range(2)
        )
        self.cos, self.sin = rotary_table(config, torch.arange(positions, device=device))  # [positions, D/2]
        # of the model that last decoded with this cache
        self.decoder: tuple[nn.Module, LayerWeights] | None = None


class PagedRows:
    """The next tokens of some sequences whose keys and values lie in pages, as rows of W tokens each.

    A sequence may have several rows, one after the other: its tokens then see those of its rows before. The rows are
    for one call of the model; who owns the pages tells the next call its lengths.
    """

    def __init__(
        self,
        pages: PagedCache,
        lengths: Tensor,
        block_table: Tensor,
        slots: tuple[Tensor, Tensor] | None = None,
    ):
        self.pages = pages
        self.keys, self.values, self.cos, self.sin = pages.keys, pages.values, pages.cos, pages.sin
        self.lengths = lengths  # int32 [R]: tokens of each row's sequence before the row
        self.block_table = block_table  # int32 [R, max_pages]
        # (page, place in it) of each token, int64 [R, W]. None: no sequence has two rows, and the kernel writes them
        self.slots = slots

    @property
    def decoder(self) -> tuple[nn.Module, LayerWeights] | None:
        """Of the model that last decoded with these pages."""
        return self.pages.decoder

    @decoder.setter
    def decoder(self, decoder: tuple[nn.Module, LayerWeights]) -> None:
        self.pages.decoder = decoder


class Layout(NamedTuple):
    """The position of every token of a batch; the same for all layers."""

    cos: Tensor | None  # [..., 1, D/2] at each token; None: the cache function rotates
    sin: Tensor | None
    cu_seqlens: Tensor | None  # int32 [B + 1]: packed
    max_seqlen: int
    cache: KVCache | PagedRows | None
    # where each token's key is written before attention: (sequence, position) of packed tokens, (page, place) of rows
    slots: tuple[Tensor, Tensor] | None


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer_index: int):
        super().__init__()
        self.config, self.layer_index, self.backend = config, layer_index, "auto"
        self.heads: slice | None = None  # the query heads that this process has; None: all
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads_q * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_heads_kv * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_heads_kv * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads_q * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, layout: Layout, prompt: Prompt | None) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.config.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(self.attend(query, key, value, layout, prompt).flatten(-2))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, prompt: Prompt | None
    ) -> Tensor:
        """Attention from [..., H, D] to [..., Hq, D]. Queries and keys are rotated here, or by the cache's kernel."""
        prompt_key, prompt_value, gate, activation, index = prompt or (None, None, None, "tanh", None)
        cache, window_left = layout.cache, self.config.window_left
        if cache is not None:
            keys, values = cache.keys[self.layer_index], cache.values[self.layer_index]
        if cache is not None and layout.slots is None:
            return zero_init_attention_with_kvcache(
                query, keys, values, key, value,
                prompt_k=prompt_key, prompt_v=prompt_value, gate=gate, cache_seqlens=cache.lengths,
                block_table=cache.block_table, rotary_cos=cache.cos, rotary_sin=cache.sin, rotary_interleaved=False,
                causal=True, window_size=(window_left, 0), gate_activation=activation, prompt_index=index,
                backend=self.backend,
            )  # fmt: skip
        query, key = Rotary.apply(query, layout.cos, layout.sin), Rotary.apply(key, layout.cos, layout.sin)
        if cache is not None and cache.block_table is not None:
            keys[layout.slots], values[layout.slots] = key, value
            return zero_init_attention_with_kvcache(
                query, keys, values, prompt_k=prompt_key, prompt_v=prompt_value, gate=gate,
                cache_seqlens=cache.lengths + layout.max_seqlen, block_table=cache.block_table,
                causal=True, window_size=(window_left, 0), gate_activation=activation, prompt_index=index,
                backend=self.backend,
            )  # fmt: skip
        if layout.cu_seqlens is not None:
            if cache is not None:
                keys[layout.slots], values[layout.slots] = key, value
            cu_seqlens_k, max_seqlen_k = layout.cu_seqlens, layout.max_seqlen
            if prompt is not None and gate is None:  # every query sees them: causality aligns the ends
                key, cu_seqlens_k = prepend(prompt_key, key, layout.cu_seqlens)
                value, _ = prepend(prompt_value, value, layout.cu_seqlens)
                max_seqlen_k += len(prompt_key)
                prompt_key = prompt_value = None
            return zero_init_attention_varlen(
                query, key, value, prompt_key, prompt_value, gate,
                layout.cu_seqlens, cu_seqlens_k, layout.max_seqlen, max_seqlen_k,
                causal=True, window_size=(window_left, 0), gate_activation=activation, prompt_index=index,
                backend=self.backend,
            )  # fmt: skip
        if prompt is not None:
            prompt_key, prompt_value = prompt_key.transpose(-3, -2), prompt_value.transpose(-3, -2)
        return zero_init_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), prompt_key, prompt_value, gate,
            is_causal=True, window_size=(window_left, 0), gate_activation=activation, prompt_index=index,
            backend=self.backend,
        ).transpose(1, 2)  # fmt: skip


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, layer_index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layout: Layout, adapter: Adapter | None) -> Tensor:
        # asked here and not by the model: where weights are sharded, a layer has them only while it runs
        prompt = None if adapter is None else adapter(self.self_attn)
        x = x + self.self_attn(self.input_layernorm(x), layout, prompt)
        return x + self.mlp(self.post_attention_layernorm(x))


# An adapter: given a layer's attention, the prompt it adds there, or None. One whose prompts depend on images also has
# `about(images)`, the adapter for a batch whose sequences are about these image files; and that one has `select(rows)`,
# the adapter for these sequences of the batch. One whose prompts stay the same from token to token says so by
# `keeps_prompts`: a generation then asks it once.
Adapter = Callable[[Attention], Prompt | None]


def about_images(adapter: Adapter | None, images: Sequence[Sequence[str]]) -> Adapter | None:
    """The adapter for a batch whose sequences are about these image files; the same one if it takes no images."""
    about = getattr(adapter, "about", None)
    return adapter if about is None else about(images)


def select_sequences(adapter: Adapter | None, rows: list[int]) -> Adapter | None:
    """The adapter for some sequences of a batch, in this order."""
    select = getattr(adapter, "select", None)
    return adapter if select is None else select(rows)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype in which a linear layer or an embedding computes: its weight's, unless that is packed."""
    return module.dtype if isinstance(module, packed.Packed) else module.weight.dtype


class Llama(nn.Module):
    """Without an adapter the network is the base model. An adapter is an argument of each call."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # layers keep their input alone, and run again in the backward pass
        # Of the weights that a quantised model was made of: `fingerprint.adapter_metadata`
        self.fingerprints: dict[str, str] | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = (
            None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @property
    def output_weight(self) -> Tensor:
        """[vocab_size, C]: what projects hidden states to logits. Of a packed weight, its numbers, made anew."""
        head = self.head
        return head.packed.unpack(head.dtype) if isinstance(head, packed.Packed) else head.weight

    @property
    def head(self) -> nn.Module:
        """What holds the output weight: the embedding, where the two are tied."""
        return self.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states, and of all weights but the packed ones."""
        return dtype_of(self.embed_tokens)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward(self, tokens: Tensor, adapter: Adapter | None = None, **layout: object) -> Tensor:
        """Logits [..., vocab_size]; the arguments are those of `hidden_states`."""
        return self.logits(self.hidden_states(tokens, adapter, **layout))

    def hidden_states(
        self,
        tokens: Tensor,
        adapter: Adapter | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KVCache | PagedRows | None = None,
        last: bool = False,
    ) -> Tensor:
        """The normed hidden states [..., C] that `logits` projects.

        tokens: [B, T], or [total] with int32 cu_seqlens [B + 1]; with max_seqlen the longest length need not be read
        from the device. cache: packed tokens are its first ones, [B, T] tokens its next ones (of a paged one, its
        rows'). It is extended in place, under no_grad. In a frozen model, layers below the lowest adapted one save
        nothing for backward. last: of packed tokens, each sequence's last one alone, [B, C].
        """
        if last and cu_seqlens is None:
            raise ValueError("last is for packed tokens: give cu_seqlens, or take the states [:, -1]")
        x = self.embed_tokens(tokens)
        layout = None
        if cache is not None:
            hidden = None
            if cu_seqlens is None:
                hidden = decode(self, x, adapter, cache)
                if hidden is None and isinstance(cache, KVCache):
                    layout = self._layout(tokens, cu_seqlens, max_seqlen, cache)
                    hidden = decode_on_device(self, x, adapter, layout)
            elif isinstance(cache, KVCache):
                hidden = prefill(self, x, adapter, cache, cu_seqlens, last)
            if hidden is not None:
                cache.lengths += tokens.shape[1] if cu_seqlens is None else cu_seqlens.diff()
                return hidden
        layout = layout or self._layout(tokens, cu_seqlens, max_seqlen, cache)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, layout, adapter, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, layout, adapter)
        if cache is not None:
            cache.lengths += tokens.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        return self.norm(x[cu_seqlens[1:].long() - 1] if last else x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., vocab_size] of hidden states [..., C]."""
        head = self.head
        if isinstance(head, packed.Packed):
            return head.packed.multiply(hidden)
        # [B, C] is decoding. Whole sequences have the same bits with gradients and without.
        multiply = packed.linear if hidden.dim() == 2 else nn.functional.linear
        return multiply(hidden, head.weight)

    def freeze(self) -> Llama:
        """Turns off the gradients of all parameters."""
        return self.requires_grad_(False)

    @torch.no_grad()
    def initialise(self, std: float = 0.02) -> Llama:
        """Normal weights for pre-training. Those that write to the residual stream shrink with depth, as in GPT-2."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(std=std / (2 * self.config.num_layers) ** 0.5 if writes else std)
        return self

    def set_backend(self, backend: str) -> Llama:
        """Sets the backend of zinit_kernels that attention runs on; "auto" by default."""
        for layer in self.layers:
            layer.self_attn.backend = backend
        return self

    def compile_layers(self) -> Llama:
        """Compiles every layer with torch.compile, for any number of tokens. Attention stays as it is."""
        for layer in self.layers:
            layer.compile(dynamic=True)
        return self

    def _layout(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        cache: KVCache | PagedRows | None,
    ) -> Layout:
        if cache is not None and cu_seqlens is None:
            if cache.slots is None:
                return Layout(None, None, None, tokens.shape[1], cache, None)
            positions = cache.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
            cos, sin = cache.cos[positions][..., None, :], cache.sin[positions][..., None, :]
            return Layout(cos, sin, None, tokens.shape[1], cache, cache.slots)
        slots = None
        if cu_seqlens is None:
            positions, max_seqlen = torch.arange(tokens.shape[1], device=tokens.device), tokens.shape[1]
        else:
            lengths = cu_seqlens.diff()
            max_seqlen = int(lengths.max()) if max_seqlen is None else max_seqlen
            sequence = torch.repeat_interleave(lengths, output_size=len(tokens))
            positions = torch.arange(len(tokens), device=tokens.device) - cu_seqlens[sequence]
            slots = None if cache is None else (sequence, positions)
        cos, sin = rotary_table(self.config, positions)
        return Layout(cos[..., None, :], sin[..., None, :], cu_seqlens, max_seqlen, cache, slots)
