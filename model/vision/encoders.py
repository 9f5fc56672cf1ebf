"""Frozen image encoders of transformers: CLIP, SigLIP, DINOv2 and ViT, with the image processors of their folders.

    encoder = load_encoder("clip-vit-large-patch14")
    features = encoder.encode([image], FeatureConfig(layers=(-1,), tokens="all", projected=True))

An encoder keeps the dtype of its files. Its processor is the folder's own, in the variant that needs no torchvision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zinit_kernels.checkpoints import CheckpointError
from zinit_kernels.checkpoints.json_files import read_json
from zinit_kernels.console import shortened, shown

from ..errors import UserError, is_out_of_memory
from ..fingerprint import checksum
from .config import FeatureConfig

_PROCESSOR = "preprocessor_config.json"
_HARMLESS = ("processor_class", "image_processor_type", "feature_extractor_type", "_")  # name no number


class Architecture(NamedTuple):
    """How transformers names an architecture's parts."""

    model: str  # the class that reads a folder
    stem: Callable[[Any], nn.Module]  # the module with the hidden states
    norm: Callable[[Any], nn.Module]  # the norm after the last layer
    class_token: bool


# by the model_type of config.json; "clip" and "siglip" are whole models, of which the images' part is taken
ARCHITECTURES = {
    "clip": Architecture(
        "CLIPVisionModelWithProjection",
        lambda m: m.vision_model,
        lambda m: m.vision_model.post_layernorm,
        True,
    ),
    "siglip": Architecture("SiglipVisionModel", lambda m: m, lambda m: _within(m, "post_layernorm"), False),
    "dinov2": Architecture("Dinov2Model", lambda m: m, lambda m: m.layernorm, True),
    "vit": Architecture("ViTModel", lambda m: m, lambda m: m.layernorm, True),
}
ARCHITECTURES |= {"clip_vision_model": ARCHITECTURES["clip"], "siglip_vision_model": ARCHITECTURES["siglip"]}


class Encoder:
    """A frozen encoder and its image processor."""

    def __init__(self, model: nn.Module, processor: Any, architecture: Architecture):
        self.model = model.eval().requires_grad_(False)
        self.processor, self.architecture = processor, architecture
        self._fingerprint = ""

    @property
    def num_layers(self) -> int:
        """Transformer layers; hidden states are numbered 0 to num_layers."""
        return int(self.model.config.num_hidden_layers)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight and any setting that features depend on."""
        if not self._fingerprint:
            digest = hashlib.sha256(json.dumps(_facts(self.model.config.to_dict()), sort_keys=True).encode())
            digest.update(json.dumps(_facts(self.processor.to_dict()), sort_keys=True).encode())
            for name, weight in sorted(self.model.state_dict().items()):
                digest.update(
                    f"{name} {tuple(weight.shape)} {weight.dtype} {checksum(weight):08x}\n".encode()
                )
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def feature_size(self, config: FeatureConfig) -> int:
        """The width of a token: the layers' widths together, or the projection's.

        Raises UserError for layers, tokens or a projection that the encoder does not have.
        """
        for layer in config.layers:
            self._layer(layer)
        if config.tokens in ("class", "patches") and not self.architecture.class_token:
            what = "a class token" if config.tokens == "class" else "a class token to leave out"
            raise UserError(f"{type(self.model).__name__} does not have {what}: take the tokens mean or all.")
        if not config.projected:
            return len(config.layers) * int(self.model.config.hidden_size)
        projection = getattr(self.model, "visual_projection", None)
        if projection is None:
            raise UserError(f"{type(self.model).__name__} has no projection, which projected features need.")
        return int(projection.out_features)

    @torch.no_grad()
    def encode(self, images: Sequence[Any], config: FeatureConfig) -> list[Tensor]:
        """The features [T, M * D] of PIL images in mode RGB, in the encoder's dtype, on the CPU."""
        if not images:
            return []
        if config.channel_order == "bgr":
            images = [_swapped(image) for image in images]
        pixels = [self.processor(image, return_tensors="pt")["pixel_values"] for image in images]
        if len({tuple(one.shape) for one in pixels}) > 1:  # a processor without a crop
            return [feature for one in pixels for feature in self.encode_pixels(one, config)]
        return list(self.encode_pixels(torch.cat(pixels), config))

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, config: FeatureConfig) -> Tensor:
        """The features [B, T, M * D] of what the processor made of B images."""
        weight = next(self.model.parameters())
        self.feature_size(config)
        layers = [self._layer(layer) for layer in config.layers]
        stem = self.architecture.stem(self.model)
        states = stem(pixels.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states
        if config.projected:
            features = self.model.visual_projection(self.architecture.norm(self.model)(states[-1]))
        else:
            features = torch.cat([states[layer] for layer in layers], -1)
        if config.tokens == "class":
            features = features[:, :1]
        elif config.tokens == "patches":
            features = features[:, 1:]
        elif config.tokens == "mean":
            features = features.mean(1, keepdim=True)
        return features.cpu()

    def blank(self, config: FeatureConfig) -> Tensor:
        """The features [T, M * D] of an image whose pixels are 0 after the processor's normalisation.

        What the published LLaMA-Adapter V2 was trained with in the place of a missing image.
        """
        from PIL import Image

        like = self.processor(Image.new("RGB", (256, 256)), return_tensors="pt")["pixel_values"]
        return self.encode_pixels(torch.zeros_like(like), config)[0]

    def _layer(self, layer: int) -> int:
        count = self.num_layers + 1
        if not -count <= layer < count:
            raise UserError(
                f"the encoder has hidden states 0 to {count - 1}, and layer {layer} is asked for."
            )
        return layer % count


def load_encoder(
    directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Encoder:
    """The encoder of a transformers folder: config.json, weights and preprocessor_config.json. dtype None: the files'.

    Raises UserError for another architecture, a folder without a processor, and weights that lack something.
    """
    directory = Path(directory)
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError("image encoders need transformers: pip install 'zinit-kernels[vision]'.") from None
    for name, what in (("config.json", "the encoder"), (_PROCESSOR, "its image processor")):
        if not (directory / name).is_file():
            raise UserError(f"{directory} has no {name}: --encoder takes a transformers folder of {what}.")
    try:
        kind = read_json(directory / "config.json").get("model_type")
        read_json(directory / _PROCESSOR)
    except CheckpointError as error:
        raise UserError(f"{error}.") from error
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"{directory} is of model_type {shown(kind)}; encoders are {', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[kind]
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        # dtype "auto" is the files'; older versions know the argument as torch_dtype alone
        name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        model, info = getattr(transformers, architecture.model).from_pretrained(
            directory, local_files_only=True, output_loading_info=True, **{name: dtype or "auto"}
        )
        processor = _processor(directory)
    except (
        Exception
    ) as error:  # damaged weights, a processor with values of the wrong kind: whatever is raised
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{directory} cannot be read as an encoder ({reason}).") from None
    finally:
        transformers.utils.logging.set_verbosity(level)
    wrong = [
        str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]) if "mask_token" not in str(key)
    ]
    if wrong:  # transformers fills them with random numbers
        raise UserError(f"{directory} lacks {shortened(sorted(wrong)[0])}, or has it in another shape.")
    return Encoder(model.to(device), processor, architecture)


def _processor(directory: Path) -> Any:
    import transformers

    options: list[dict[str, Any]] = [{"backend": "pil"}, {"use_fast": False}]  # of transformers 5, and of 4
    if int(transformers.__version__.split(".")[0]) < 5:
        options.reverse()
    return transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True, **options[0])


def _within(model: Any, name: str) -> nn.Module:
    """A part of the model that transformers 4 has one level further down."""
    return getattr(model, name) if hasattr(model, name) else getattr(model.vision_model, name)


def _swapped(image: Any) -> Any:
    from PIL import Image

    red, green, blue = image.split()
    return Image.merge("RGB", (blue, green, red))


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says where it came from and which program wrote it."""
    dropped = (
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
    )
    return {
        name: value
        for name, value in config.items()
        if name not in (*dropped, *_HARMLESS) and not callable(value) and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
