"""The adapter: prompts and gates, the only parameters that are trained.

    base = load_base(directory).freeze()
    adapter = LlamaAdapter(base.config, AdapterConfig())
    optimizer = AdamW(adapter.parameters())
    hidden = base.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens)

The prompts of a layer go through the layer's own k_proj and v_proj (eq. 5 of arXiv 2303.16199), without the
rotary embedding. At gate 0 (how training starts) the model's output is the base's, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .config import AdapterConfig, LlamaConfig
from .llama import Attention, Prompt

# Adapters that keep something. A fused optimizer changes parameters and not their versions (torch 2.13).
_adapters: WeakSet[LlamaAdapter] = WeakSet()
register_optimizer_step_post_hook(lambda *_: [adapter.forget() for adapter in _adapters])


class Kept(NamedTuple):
    """A layer's projected prompts, and what tells whether they are still what a projection would give."""

    prompt: Prompt
    autocast: torch.dtype | None
    # Each tensor they come from, its storage and its version. Weakly: the replaced is free to go, and its reference
    # is then to nothing, where an id or an address may come again.
    sources: list[tuple[ReferenceType[Tensor], ReferenceType[torch.UntypedStorage], int]]

    def is_current(self, tensors: list[Tensor], autocast: torch.dtype | None) -> bool:
        """Whether these are the tensors, as they were: an in-place change moves the version, a cast the storage."""
        return (
            autocast == self.autocast
            and len(tensors) == len(self.sources)
            and all(
                held() is tensor and storage() is tensor.untyped_storage() and version == tensor._version
                for tensor, (held, storage, version) in zip(tensors, self.sources, strict=True)
            )
        )


class LlamaAdapter(nn.Module):
    """prompts float32 [L, P, C] and raw gates float32 [L, Hq] (None with gate_init "none") of the adapted layers,
    lowest first.

    Float32 whatever the base's dtype: a gate's first steps are below bfloat16's resolution. An adapter is
    passed to each call of the base, `base(tokens, adapter)`, and holds no reference to it.
    """

    def __init__(
        self,
        model: LlamaConfig,
        config: AdapterConfig | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.config = config or AdapterConfig()
        self.layers = self.config.layers(model.num_layers)
        self.prompts = nn.Parameter(
            torch.randn(len(self.layers), self.config.prompt_length, model.hidden_size, generator=generator)
        )
        gates = torch.zeros(len(self.layers), model.num_heads_q)
        if self.config.gate_init == "random":
            gates.normal_(generator=generator)
        self.gates = None if self.config.gate_init == "none" else nn.Parameter(gates)
        self._kept: WeakKeyDictionary[Attention, Kept] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Without the kept projections: they belong to bases that a copy or a file does not hold."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kept = WeakKeyDictionary()

    @property
    def num_parameters(self) -> int:
        """Trainable parameters: 1,229,760 for the paper's 7B."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, attention: Attention) -> Prompt | None:
        """What this adapter adds to a layer; None where it adds nothing.

        With gradients off the projected prompts are computed once and kept until the prompts, the gates or
        the projections change, or an optimizer makes a step (a write through `.data` is not seen: `forget`
        then). With gradients on they are always computed: a kept graph would train nothing
        (Lightning-AI/litgpt#1287).
        """
        row = attention.layer_index - self.layers[0]
        if not 0 <= row < len(self.layers):
            return None
        if torch.is_grad_enabled():
            return self._project(row, attention)
        tensors = [*self.parameters(), *attention.k_proj.parameters(), *attention.v_proj.parameters()]
        if any(tensor.is_inference() for tensor in tensors):  # these have no version
            return self._project(row, attention)
        device = self.prompts.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kept = self._kept.get(attention)
        if kept is None or not kept.is_current(tensors, autocast):
            sources = [(ref(tensor), ref(tensor.untyped_storage()), tensor._version) for tensor in tensors]
            _adapters.add(self)
            kept = self._kept[attention] = Kept(self._project(row, attention), autocast, sources)
        return kept.prompt

    def forget(self) -> None:
        """Drops the projected prompts that were kept; only needed after writing through `.data`."""
        self._kept.clear()

    def _project(self, row: int, attention: Attention) -> Prompt:
        prompts = self.prompts[row].to(attention.k_proj.weight.dtype)
        key, value = (
            project(prompts).unflatten(-1, (-1, attention.config.head_dim))
            for project in (attention.k_proj, attention.v_proj)
        )
        gate = None if self.gates is None else self.gates[row]
        return Prompt(key, value, gate, self.config.gate_activation)
