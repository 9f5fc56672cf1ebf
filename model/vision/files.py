"""Adapters with a visual part, from disk and back, beside those without one.

The file is a `zinit` adapter, safetensors with `prompts` and `gates`. The visual part stands beside them as
`extra.projection.*` and `extra.standardise.*`, and the metadata hold its configuration: `visual` (VisualConfig) and
`features` (FeatureConfig) as JSON, and `encoder`, the fingerprint of the encoder that it was trained with. Programs
that know nothing of images refuse the file, because prompts and gates are not the whole adapter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from zinit_kernels.checkpoints import AdapterCheckpoint, CheckpointError
from zinit_kernels.checkpoints.adapter import some
from zinit_kernels.checkpoints.json_files import parse_object

from ..adapter import LlamaAdapter
from ..adapter_files import check_checkpoint, checkpoint_of, fill_adapter, read_checkpoint, write_checkpoint
from ..config import LlamaConfig
from ..errors import UserError
from ..llama import Llama
from .adapter import VisualAdapter
from .config import FeatureConfig, VisualConfig, from_json, to_json
from .official_v2 import EXTRAS_FORMAT as OFFICIAL_V2
from .official_v2 import open_official_v2

EXTRAS_FORMAT = "vision"
_PARTS = ("projection.", "standardise.")


def save_adapter(
    path: str | Path,
    adapter: LlamaAdapter,
    model: LlamaConfig,
    format: str = "zinit",
    metadata: dict[str, str] | None = None,
) -> None:
    """As `model.adapter_files.save_adapter`, and for a `VisualAdapter` with all its parts; only "zinit" has room."""
    checkpoint = checkpoint_of(path, adapter, model, metadata)
    if isinstance(adapter, VisualAdapter):
        state = adapter.state_dict()
        checkpoint = replace(
            checkpoint,
            extras={name: tensor for name, tensor in state.items() if name.startswith(_PARTS)},
            extras_format=EXTRAS_FORMAT,
            metadata=checkpoint.metadata
            | {
                "visual": to_json(adapter.visual_config),
                "features": to_json(adapter.feature_config),
                "encoder": adapter.encoder_fingerprint,
            },
        )
    write_checkpoint(path, checkpoint, format)


def load_adapter(
    path: str | Path, base: Llama, prompt_length: int | None = None, gate_activation: str | None = None
) -> LlamaAdapter:
    """The adapter of a file: a `VisualAdapter` if it has a visual part, else a `LlamaAdapter`.

    The arguments and errors are those of `model.adapter_files.load_adapter`.
    """
    return _adapter(path, read_checkpoint(path, prompt_length, gate_activation), base, prompt_length)


def _adapter(
    path: str | Path, checkpoint: AdapterCheckpoint, base: Llama, prompt_length: int | None
) -> LlamaAdapter:
    if checkpoint.extras_format == EXTRAS_FORMAT:
        return _visual(path, checkpoint, base, prompt_length)
    config = check_checkpoint(path, checkpoint, base.config, prompt_length, base)
    adapter = LlamaAdapter(base.config, config, torch.Generator())
    fill_adapter(adapter, checkpoint)
    return adapter


def open_adapter(
    path: str | Path, base: Llama, prompt_length: int | None = None, gate_activation: str | None = None
) -> tuple[Llama, LlamaAdapter]:
    """The adapter of a file and the model that it belongs to: the base, or, for a published LLaMA-Adapter V2, the base
    with the file's biases, LoRA factors and norms.

    The arguments and errors are those of `model.adapter_files.load_adapter`.
    """
    checkpoint = read_checkpoint(path, prompt_length, gate_activation)
    if checkpoint.extras_format == OFFICIAL_V2:
        return open_official_v2(path, checkpoint, base)
    return base, _adapter(path, checkpoint, base, prompt_length)


def _visual(
    path: str | Path, checkpoint: AdapterCheckpoint, base: Llama, prompt_length: int | None
) -> VisualAdapter:
    plain = replace(checkpoint, extras={}, extras_format="")
    config = check_checkpoint(path, plain, base.config, prompt_length, base)
    visual, features = (
        _config(path, checkpoint, name, kind)
        for name, kind in (("visual", VisualConfig), ("features", FeatureConfig))
    )
    with torch.device("meta"):  # its sizes come from the file: they are compared before anything is allocated
        shapes = VisualAdapter(base.config, config, visual, features).state_dict()
    expected = {name: tensor for name, tensor in shapes.items() if name.startswith(_PARTS)}
    found = checkpoint.extras
    if expected.keys() != found.keys():
        lacking, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
        what = f"lacks {some(lacking)}" if lacking else f"holds unknown {some(unknown)}"
        raise UserError(f"{path} {what}: its visual part is not what its configuration says.")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, and {tuple(expected[name].shape)} is expected."
            )
        if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
            raise UserError(f"{path}: {name} holds what are no finite floating-point numbers.")
    adapter = VisualAdapter(base.config, config, visual, features, torch.Generator())
    fill_adapter(adapter, plain)
    adapter.load_state_dict(dict(found), strict=False)  # all but prompts and gates, which are in
    adapter.encoder_fingerprint = checkpoint.metadata.get("encoder", "")
    return adapter


def _config(path: str | Path, checkpoint: AdapterCheckpoint, name: str, kind: type) -> VisualConfig:
    where = f"{path}: the metadata {name!r}"
    try:
        content = parse_object(checkpoint.metadata.get(name, ""), where)
    except CheckpointError as error:
        raise UserError(f"{error}.") from error
    try:
        return from_json(kind, content, where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except TypeError:  # a list within a list, which is no value of any field
        raise UserError(f"{where} holds a value of the wrong kind.") from None
