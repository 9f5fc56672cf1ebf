"""Tiny encoders with random weights, written as transformers writes folders, and small pictures."""

import importlib

import numpy as np
import torch
import transformers
from PIL import Image

transformers.utils.logging.disable_progress_bar()

_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ENCODERS = ("clip", "siglip", "dinov2", "vit")


def encoder_model(kind, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = _SIZES | changes
    if kind == "clip":
        return transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**sizes, projection_dim=16, initializer_factor=5.0)
        ).eval()
    if kind == "siglip":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)).eval()
    if kind == "dinov2":
        del sizes["intermediate_size"]
        return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, layerscale_value=0.5)).eval()
    return transformers.ViTModel(transformers.ViTConfig(**sizes)).eval()


def processor(kind, size=28):
    """Of transformers 5 the variant that needs no torchvision; of transformers 4 it is the plain one."""
    name = {"siglip": "Siglip", "vit": "ViT"}.get(kind, "CLIP")
    folder = f"transformers.models.{name.lower()}.image_processing"
    if int(transformers.__version__.split(".")[0]) >= 5:
        module, name = f"{folder}_pil_{name.lower()}", f"{name}ImageProcessorPil"
    else:
        module, name = f"{folder}_{name.lower()}", f"{name}ImageProcessor"
    square = {"height": size, "width": size}
    options = {"size": {"shortest_edge": size}, "crop_size": square} if "CLIP" in name else {"size": square}
    return getattr(importlib.import_module(module), name)(**options)


def encoder_folder(path, kind="clip", seed=0, **changes):
    """Writes the encoder and its processor; returns the model."""
    model = encoder_model(kind, seed, **changes)
    model.save_pretrained(path)
    processor(kind).save_pretrained(path)
    return model


def picture(path, seed=0, size=(40, 32)):
    """Writes a random picture and returns its path as text."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)
