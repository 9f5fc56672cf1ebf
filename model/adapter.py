"""The adapter: prompts and gates, the only parameters that are trained.

    base = load_base(directory).freeze()
    adapter = LlamaAdapter(base.config, AdapterConfig())
    optimizer = AdamW(adapter.parameters())
    hidden = base.hidden_states(tokens, adapter, cu_seqlens=cu_seqlens)

The prompts of a layer go through the layer's own k_proj and v_proj (eq. 5 of arXiv 2303.16199), without the
rotary embedding. Gates start at 0: the output is then bit for bit what this model gives without an
adapter.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from zinit_kernels.projected import KeptProjections, sources_of, stamp

from .config import AdapterConfig, LlamaConfig
from .llama import Attention, Prompt, dtype_of


class LlamaAdapter(nn.Module):
    """The parameters of the adapted layers, lowest layer first: prompts, float32 [L, P, C], and gates before their
    activation, float32 [L, Hq] (None with gate_init "none").

    They are float32 whatever the base's dtype, because a gate's first steps are too small for bfloat16. An adapter is
    an argument of each call of the base, `base(tokens, adapter)`, and holds no reference to it.
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
        self._kept: KeptProjections[Prompt] = KeptProjections()
        self._times_forgotten = 0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters: 1,229,760 for the paper's 7B."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def forward(self, attention: Attention) -> Prompt | None:
        """What this adapter adds to a layer; None for a layer that is not adapted.

        With gradients off, the projected prompts are computed once and kept until the prompts, the gates or the
        projections change, or until an optimizer makes a step. A write through `.data` is not noticed; call `forget`
        after it. With gradients on they are computed at every call, because a graph that is kept would train nothing
        (Lightning-AI/litgpt#1287).
        """
        row = attention.layer_index - self.layers[0]
        if not 0 <= row < len(self.layers):
            return None
        projections = projections_of(attention)
        # the projections are this model's own, without anything that a hook would have to observe
        sources = sources_of(self.parameters(), projections, hooks_observe=True)
        prompt = self._kept.recall(attention, None, sources)
        if prompt is None:
            made_of = stamp(None, sources)
            prompt = self._project(row, attention)
            self._kept.keep(attention, made_of, prompt)
        return prompt

    def made_of(self) -> tuple[Hashable, tuple[Tensor, ...] | None]:
        """What the prompts of all layers are made of, beside the layers' projections: settings and tensors.

        The tensors are None where calling the adapter may do more than compute prompts: with hooks of its own, or in a
        subclass. The decoder asks for hooks of all modules.
        """
        hooks = self._forward_hooks, self._forward_pre_hooks
        settings = self._times_forgotten, self.config, self.layers
        if type(self) is not LlamaAdapter or "forward" in self.__dict__ or any(hooks):
            return settings, None
        return settings, (self.prompts,) if self.gates is None else (self.prompts, self.gates)

    @property
    def keeps_prompts(self) -> bool:
        """Whether its prompts stay the same from token to token: not known where calling it may do more."""
        return self.made_of()[1] is not None

    @torch.no_grad()
    def layer_gradient_norms(self) -> list[float]:
        """The norm of each adapted layer's gradient, prompts and gates together, lowest layer first."""
        squares = sum(
            parameter.grad.double().square().flatten(1).sum(1)
            for parameter in (self.prompts, self.gates)
            if parameter is not None and parameter.grad is not None
        )
        return squares.sqrt().tolist() if isinstance(squares, Tensor) else []

    @torch.no_grad()
    def layer_gates(self) -> list[float]:
        """The mean over heads of |tanh(gate)| (|gate| for the activation "identity") in each adapted layer: how much
        of the prompts' branch is added. Empty without gates.
        """
        if self.gates is None:
            return []
        gates = self.gates.tanh() if self.config.gate_activation == "tanh" else self.gates
        return gates.abs().mean(1).tolist()

    def forget(self) -> None:
        """Drops the projected prompts that are kept. Needed only after a write through `.data`."""
        self._kept.clear()
        self._times_forgotten += 1

    def _project(self, row: int, attention: Attention) -> Prompt:
        key, value = project_prompts(self.prompts[row], attention)
        gate = None if self.gates is None else self.gates[row]
        if gate is not None and attention.heads is not None:
            gate = gate[attention.heads]
        return Prompt(key, value, gate, self.config.gate_activation)


def projections_of(attention: Attention) -> tuple[nn.Module, nn.Module]:
    """The key and value projections that prompts go through: those of a layer with deltas without them."""
    key, value = attention.k_proj, attention.v_proj
    return getattr(key, "plain", key), getattr(value, "plain", value)


def project_prompts(prompts: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """The keys and values [..., Hkv, D] of prompts [..., C], by a layer's own projections."""
    prompts = prompts.to(dtype_of(projections_of(attention)[0]))
    key, value = (
        project(prompts).unflatten(-1, (-1, attention.config.head_dim))
        for project in projections_of(attention)
    )
    return key, value
