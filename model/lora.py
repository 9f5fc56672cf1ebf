"""LoRA in the place of the adapter, through PEFT: trained by the same program, saved as PEFT saves it.

    lora = Lora(base, LoraChoice(rank=8), seed=0)      # puts PEFT's layers into the base
    save_lora("out/lora", lora, "path/of/the/base")

y = W x + alpha / rank * B A x for the chosen linear layers of every layer (arXiv 2106.09685); W is frozen, and B begins
as 0, so the model begins as the base. A and B are float32 whatever the base's dtype.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from zinit_kernels.packed import PackedLinear

from .errors import UserError
from .llama import Attention, Llama
from .quantised import QuantisedLinear
from .run_folder import make_directory, write_files

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NAME = "default"  # PEFT's, of the only adapter


@dataclass(frozen=True)
class LoraChoice:
    """What shapes a LoRA. targets: the linear layers of each layer, PEFT's own choice for LLaMA by default."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"--rank must be at least 1, got {self.rank}.")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"--lora-alpha must be above 0, got {self.alpha}.")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise UserError(f"--lora-targets {unknown[0]!r}: the linear layers are {', '.join(TARGETS)}.")


class Lora(nn.Module):
    """The factors of a base, which they are put into. It is given to the base's calls as an adapter is, and adds
    nothing to attention.
    """

    gates = None

    def __init__(self, base: Llama, config: LoraChoice, seed: int = 0):
        super().__init__()
        try:
            import peft
        except ImportError:
            raise UserError(
                "--method lora needs PEFT, which is not installed: pip install 'zinit-kernels[lora]'."
            ) from None

        self.config, self.layers = config, range(base.config.num_layers)
        theirs = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), task_type="CAUSAL_LM"
        )
        # PEFT knows the layers of its own list alone, though its layer for linear ones calls any that it is given
        of_linear = peft.tuners.lora.Linear
        theirs._register_custom_module({PackedLinear: of_linear, QuantisedLinear: of_linear})
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            peft.inject_adapter_in_model(theirs, base, _NAME)
        self.peft_config = theirs
        self._names: dict[str, str] = {}  # ours -> the one in the base
        for name, parameter in base.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                ours = name.replace(".", "__")
                self._names[ours] = name
                self.register_parameter(ours, parameter)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, attention: Attention) -> None:
        """Nothing is added to attention."""

    @torch.no_grad()
    def layer_gradient_norms(self) -> list[float]:
        """The norm of each layer's gradient, lowest layer first."""
        squares = [0.0] * len(self.layers)
        for ours, parameter in self.named_parameters():
            if parameter.grad is not None:
                squares[int(ours.split("__")[1])] += parameter.grad.double().square().sum().item()
        return [square**0.5 for square in squares]

    def layer_gates(self) -> list[float]:
        """There are none."""
        return []

    def peft_state(self) -> dict[str, Tensor]:
        """The factors under the names that PEFT gives them in a transformers model."""
        return {
            f"base_model.model.model.{name.replace(f'.{_NAME}', '')}": getattr(self, ours).detach()
            for ours, name in self._names.items()
        }


def save_lora(folder: str | Path, lora: Lora, base: str | Path) -> None:
    """Writes the folder that `peft.PeftModel.from_pretrained` reads, for the transformers model of the same base."""
    folder = make_directory(folder)
    state = {name: tensor.cpu().contiguous() for name, tensor in lora.peft_state().items()}
    config = lora.peft_config.to_dict() | {"base_model_name_or_path": str(base), "inference_mode": True}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_files(
        {
            folder / "adapter_model.safetensors": to_safetensors(state, {"format": "pt"}),
            folder / "adapter_config.json": (json.dumps(plain, indent=2, default=str) + "\n").encode(),
        }
    )
