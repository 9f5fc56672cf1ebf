"""The options of the programs that concern images, and what they give: features, and an adapter with a visual part."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..adapter import LlamaAdapter
from ..config import AdapterConfig
from ..errors import UserError, warn
from ..llama import Llama
from .adapter import VisualAdapter
from .config import TOKENS, FeatureConfig, VisualConfig
from .encoders import Encoder, load_encoder
from .features import Features

_DEFAULT_SCALES = 4  # layers that are taken by default, evenly spaced, the last one among them
_WIDTHS = {"bottleneck": 64, "queries": 256}
_FOR_NEW = {  # options that shape a new visual part -> the argument's name
    "--image-layers": "image_layers",
    "--image-tokens": "image_tokens",
    "--channel-order": "channel_order",
    "--visual": "visual",
    "--visual-width": "visual_width",
    "--visual-blocks": "visual_blocks",
    "--visual-heads": "visual_heads",
    "--raw-features": "raw_features",
}
_FOR_TRAINING = {
    "--stage": "stage",
    "--projection-lr": "projection_lr",
    "--skip-bad-images": "skip_bad_images",
}
_FOR_ENCODER = {
    "--images": "images",
    "--feature-cache": "feature_cache",
    "--convert-images": "convert_images",
}


def add_encoder_options(parser: argparse._ActionsContainer) -> None:
    """Those of every program that reads images."""
    # fmt: off
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="the image encoder: a transformers folder of CLIP, "
                        "SigLIP, DINOv2 or ViT with its image processor")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the images that a file names are (default: "
                        "in the file's own folder)")
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="keep the features of images here, so that "
                        "the next run does not encode them again (default: in memory)")
    parser.add_argument("--convert-images", action="store_true", help="also take images that are not 8-bit RGB or "
                        "greyscale: palettes, alpha (on white), CMYK, 16 bits, the first frame of an animation")
    # fmt: on


def add_training_options(parser: argparse._ActionsContainer) -> None:
    """Those that say which visual part is trained, and how."""
    add_encoder_options(parser)
    # fmt: off
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out records whose image is missing or "
                        "cannot be read, instead of refusing the data")
    parser.add_argument("--visual", choices=tuple(_WIDTHS), help="the paper's bottleneck on global features, or "
                        "learned queries that look at all patches, as in LLaMA-Adapter V2 (default: bottleneck)")
    parser.add_argument("--image-layers", metavar="N,N", help="the encoder's layers whose features are concatenated, "
                        f"0 the embedding; --image-layers=-1 is the last (default: {_DEFAULT_SCALES}, evenly spaced)")
    parser.add_argument("--image-tokens", choices=TOKENS, help="which tokens of these layers (default: class, or the "
                        "mean where the encoder has no class token, for bottleneck; all for queries)")
    parser.add_argument("--channel-order", choices=("rgb", "bgr"), help="default: rgb; bgr is for adapters that go on "
                        "from the published V2")
    parser.add_argument("--visual-width", type=int, help=f"of the projection (default: {_WIDTHS['bottleneck']} for "
                        f"bottleneck, {_WIDTHS['queries']} for queries)")
    parser.add_argument("--visual-blocks", type=int, help="transformer blocks of queries (default: 2)")
    parser.add_argument("--visual-heads", type=int, help="attention heads of each block (default: 4)")
    parser.add_argument("--raw-features", action="store_true", help="do not standardise features by the mean and "
                        "deviation that the training images have")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="of the paper's two: 1 trains the projection, "
                        "prompts and gates, on captions; 2, which goes on from --init, leaves the projection as it is "
                        "(default: all is trained, in one stage)")
    parser.add_argument("--projection-lr", type=float, metavar="FACTOR", help="the projection's learning rate is this "
                        "times the prompts' (default: 1)")
    # fmt: on


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that would have no effect, before anything is read."""
    if options.encoder is None:
        for option, name in (_FOR_NEW | _FOR_TRAINING | _FOR_ENCODER).items():
            if getattr(options, name, None):
                raise UserError(f"{option} belongs to --encoder, which was not given.")
    if options.encoder is not None and getattr(options, "format", "zinit") != "zinit":
        raise UserError(f"--format {options.format} has no room for a visual part: take --format zinit.")
    if getattr(options, "stage", None) == 2 and options.init is None:
        raise UserError(
            "--stage 2 leaves the projection as it is, and a new one is random: pass the adapter of stage 1 by --init."
        )


def open_source(
    options: argparse.Namespace, adapter: VisualAdapter, device: torch.device | str = "cpu"
) -> Features:
    """The features that the adapter was trained with. Raises UserError if --encoder is another one."""
    return source_of(options, adapter, load_encoder(options.encoder, device=device))


def source_of(options: argparse.Namespace, adapter: VisualAdapter, encoder: Encoder) -> Features:
    """As `open_source`, with an encoder that has been loaded."""
    features = Features(encoder, adapter.feature_config, options.feature_cache, options.convert_images)
    return _source(options, adapter, features)


def visual_adapter(
    options: argparse.Namespace, base: Llama, config: AdapterConfig, init: LlamaAdapter | None
) -> VisualAdapter:
    """The adapter to train with --encoder: --init's if that has a visual part, or a new one, with --init's prompts
    and gates if it has none. Its features come from the encoder.
    """
    if isinstance(init, VisualAdapter):
        for option, name in _FOR_NEW.items():
            if getattr(options, name):
                raise UserError(f"{option} is for a new visual part, and {options.init} has one already.")
        init.source = open_source(options, init, base.device)
        return init
    encoder = load_encoder(options.encoder, device=base.device)
    if options.stage == 2:
        raise UserError(
            f"--stage 2 leaves the projection as it is, and {options.init} has none: pass the adapter of stage 1."
        )
    kind = options.visual or "bottleneck"
    if kind == "bottleneck":
        for option, name in (("--visual-blocks", "visual_blocks"), ("--visual-heads", "visual_heads")):
            if getattr(options, name) is not None:
                raise UserError(f"{option} is of --visual queries.")
    tokens = options.image_tokens or _default_tokens(kind, encoder.architecture.class_token)
    features = FeatureConfig(
        _layers(options.image_layers, encoder.num_layers),
        tokens,
        channel_order=options.channel_order or "rgb",
    )
    source = Features(encoder, features, options.feature_cache, options.convert_images)
    visual = VisualConfig(
        kind,
        source.feature_size,
        _WIDTHS[kind] if options.visual_width is None else options.visual_width,
        blocks=0 if kind == "bottleneck" else 2 if options.visual_blocks is None else options.visual_blocks,
        heads=1 if kind == "bottleneck" else 4 if options.visual_heads is None else options.visual_heads,
        standardise=not options.raw_features,
    )
    generator = torch.Generator().manual_seed(options.seed)
    adapter = VisualAdapter(base.config, config, visual, features, generator)
    if init is not None:
        adapter.load_state_dict(init.state_dict(), strict=False)
    adapter.encoder_fingerprint, adapter.source = encoder.fingerprint, source
    return adapter


def _source(options: argparse.Namespace, adapter: VisualAdapter, features: Features) -> Features:
    if features.feature_size != adapter.visual_config.feature_size:
        raise UserError(
            f"--encoder {options.encoder} gives features of width {features.feature_size}, and the adapter was trained "
            f"with {adapter.visual_config.feature_size}: it is another encoder."
        )
    known = adapter.encoder_fingerprint
    if known and known != features.encoder.fingerprint:
        raise UserError(
            f"--encoder {options.encoder} is another encoder (or another image processor, or in another dtype) than "
            "the adapter was trained with: its features would mean something else."
        )
    if not known:
        warn(
            "the adapter's file does not say which encoder it was trained with: features of another mean nothing."
        )
    return features


def _default_tokens(kind: str, class_token: bool) -> str:
    if kind == "queries":
        return "all"
    return "class" if class_token else "mean"


def _layers(text: str | None, num_layers: int) -> tuple[int, ...]:
    if text is None:
        count = min(_DEFAULT_SCALES, num_layers)
        return tuple(round(num_layers * (place + 1) / count) for place in range(count))
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--image-layers must be whole numbers with commas between them, got {text!r}."
        ) from None
