"""The multi-modal adapter: prompts that depend on an image, which is an argument of each call.

    seen = adapter.with_images(features, [(0,), (0,), (), (1, 2)])  # per sequence, the images it is about
    hidden = base.hidden_states(tokens, seen, cu_seqlens=cu_seqlens)

`features` are those of the distinct images of a call, each a matrix [T, feature_size]. A set of images is projected
once, and its prompt keys and values once per layer, for all sequences that ask about it and for all tokens that are
decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from zinit_kernels.projected import KeptProjections, sources_of, stamp

from ..adapter import LlamaAdapter, project_prompts, projections_of
from ..config import AdapterConfig, LlamaConfig
from ..errors import UserError
from ..llama import Attention, Prompt
from .config import FeatureConfig, VisualConfig
from .projection import Standardise, make_projection


class FeatureSource(Protocol):
    """What gives the features of images, each a matrix [T, feature_size]: `model.vision.features.Features`."""

    def of(self, paths: Sequence[str]) -> list[Tensor]:
        """Of these image files, in order."""

    def blank(self) -> Tensor:
        """Of the image that stands for no image."""


class VisualAdapter(LlamaAdapter):
    """A `LlamaAdapter` with a visual part. Called as it is, without images, it is the text adapter of its prompts."""

    def __init__(
        self,
        model: LlamaConfig,
        config: AdapterConfig | None = None,
        visual: VisualConfig | None = None,
        features: FeatureConfig | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__(model, config, generator)
        if self.gates is None:
            raise UserError("an adapter without gates is only for comparison, and takes no images.")
        self.visual_config, self.feature_config = visual or VisualConfig(), features or FeatureConfig()
        with torch.random.fork_rng(devices=[]):
            if generator is not None:
                torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
            self.projection = make_projection(
                self.visual_config, model.hidden_size, self.config.prompt_length
            )
        size = self.visual_config.feature_size
        self.standardise = Standardise(size) if self.visual_config.standardise else nn.Identity()
        self.encoder_fingerprint = ""  # of the encoder that it is trained with; "" = not known
        self.source: FeatureSource | None = None  # gives the features of image files

    def about(self, images: Sequence[Sequence[str]]) -> SeeingAdapter:
        """This adapter for one call of the base. images: for each sequence, the image files it is about, in order.

        `source` gives their features, and, for an adapter that was trained so, those of the blank image that stands
        for none. Raises UserError where there is no source, and for a file that is no image.
        """
        paths = list(dict.fromkeys(path for chosen in images for path in chosen))
        blank = self.visual_config.blank_image and not all(images)
        if self.source is None and (paths or blank):
            what = "a blank image for sequences without one" if blank else "images"
            raise UserError(f"the adapter sees {what}, and there is no encoder for them: pass --encoder.")
        features = self.source.of(paths) if self.source is not None else []
        places = {path: place for place, path in enumerate(paths)}
        sets = [tuple(places[path] for path in chosen) for chosen in images]
        if blank and self.source is not None:
            features = [*features, self.source.blank()]
            sets = [chosen or (len(paths),) for chosen in sets]
        return self.with_images(features, sets)

    def with_images(self, features: Sequence[Tensor], images: Sequence[Sequence[int]]) -> SeeingAdapter:
        """This adapter for one call of the base, of as many sequences as `images` has.

        features: of each image [T, feature_size], any dtype. images: for each sequence, which of them it is about,
        in order; () for none.
        Raises UserError for features of another width, or a number of an image that is not there.
        """
        sets = list(dict.fromkeys(tuple(chosen) for chosen in images if chosen))
        for chosen in sets:
            if not 0 <= min(chosen) <= max(chosen) < len(features):
                raise UserError(f"a sequence is about the images {chosen}, and {len(features)} are given.")
        size = self.visual_config.feature_size
        for feature in features:
            if feature.dim() != 2 or feature.shape[1] != size or not len(feature):
                raise UserError(
                    f"the adapter takes features of shape (tokens, {size}), got {tuple(feature.shape)}: they are of "
                    "another encoder, or of other layers of it, than the adapter was trained with."
                )
        first = int(any(not chosen for chosen in images))  # row 0 is that of sequences without an image
        rows = {chosen: row for row, chosen in enumerate(sets, first)}
        index = torch.tensor([rows[tuple(chosen)] if chosen else 0 for chosen in images], dtype=torch.int32)
        device = self.prompts.device
        visual = self._see([torch.cat([features[i] for i in chosen]) for chosen in sets]) if sets else None
        return SeeingAdapter(self, visual, bool(first), index.to(device))

    def _see(self, sets: list[Tensor]) -> Tensor:
        """What each set of images adds to the prompts: [S, 1 or P, C]."""
        dtype, device = self.prompts.dtype, self.prompts.device
        lengths = [len(tokens) for tokens in sets]
        longest = max(lengths)
        features = torch.nn.utils.rnn.pad_sequence(
            [tokens.to(device, dtype) for tokens in sets], batch_first=True
        )
        padding = None
        if min(lengths) < longest:
            ends = torch.tensor(lengths, device=device)
            padding = torch.arange(longest, device=device) >= ends[:, None]
        return self.projection(self.standardise(features), padding)


class SeeingAdapter:
    """A `VisualAdapter` with the images of one call. It is made anew for every call, or for one generation."""

    keeps_prompts = True

    def __init__(self, adapter: VisualAdapter, visual: Tensor | None, with_blind: bool, index: Tensor):
        self.adapter, self.visual, self.with_blind, self.index = adapter, visual, with_blind, index
        self._kept: KeptProjections[Prompt] = KeptProjections()

    def __call__(self, attention: Attention) -> Prompt | None:
        """The table of this layer's prompts, with a row for each set of images, and each sequence's row."""
        row = attention.layer_index - self.adapter.layers[0]
        if not 0 <= row < len(self.adapter.layers):
            return None
        projections = projections_of(attention)
        # not all parameters: those of the projection made `visual`, and asking about 100 of them for every layer and
        # token takes milliseconds
        tensors = [t for t in (self.adapter.prompts, self.adapter.gates, self.visual) if t is not None]
        sources = sources_of(tensors, projections, hooks_observe=True)
        prompt = self._kept.recall(attention, None, sources)
        if prompt is None:
            made_of = stamp(None, sources)
            prompt = self._project(row, attention)
            self._kept.keep(attention, made_of, prompt)
        return prompt._replace(index=self.index)

    def select(self, sequences: Sequence[int]) -> SeeingAdapter:
        """The adapter for these sequences of the call, in this order; what was projected is kept."""
        chosen = SeeingAdapter(
            self.adapter,
            self.visual,
            self.with_blind,
            self.index[torch.tensor(sequences, device=self.index.device)],
        )
        chosen._kept = self._kept
        return chosen

    def _project(self, row: int, attention: Attention) -> Prompt:
        adapter = self.adapter
        prompts = adapter.prompts[row][None]
        tables = []
        if self.with_blind or self.visual is None:
            tables.append(prompts)
        if self.visual is not None:
            tables.append(prompts + self.visual)
        key, value = project_prompts(torch.cat(tables), attention)
        return Prompt(key, value, adapter.gates[row], adapter.config.gate_activation)
