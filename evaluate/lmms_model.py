"""A LLaMA with a zero-init adapter as a model of lmms-eval, which knows it by the name zinit."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from model.vision.images import as_rgb

from . import models
from .asking import batches
from .question import Item, Picture
from .shared import default_device


class ZeroInit(lmms):
    """Answers greedily. A picture that several questions of a batch are about is encoded once.

    Args:
        base, adapter, encoder: as for `python -m evaluate`. batch_size: questions answered at once.
        max_new_tokens: where a task does not say. brief: ask for a single word or phrase, as the authors' template for
            MME does.

    Raises:
        UserError: a base or an adapter that cannot be loaded, or a question with an image for an adapter without a
            visual part.
    """

    is_simple = True

    def __init__(
        self,
        base: str,
        adapter: str | None = None,
        encoder: str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int = 128,
        brief: bool | str = False,
        **options: Any,
    ):
        super().__init__()
        if options:
            raise ValueError(
                f"the model zinit has no option {min(options)}; it has base, adapter, encoder, dtype and brief"
            )
        wording = models.Wording(brief=str(brief).lower() == "true")
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)
        self.answerer = models.load(
            Path(base), None if adapter is None else Path(adapter), self.max_new_tokens, wording, dtype,
            device or default_device(), None if encoder is None else Path(encoder),
        )  # fmt: skip

    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer for each request, in order; cut at the task's stop texts."""
        found: dict[int, str] = {}
        groups: dict[tuple[int, tuple[str, ...]], list[Item]] = {}
        for number, request in enumerate(requests):
            context, options, to_pictures, document, task, split = request.args
            pictures = [] if to_pictures is None else to_pictures(self.task_dict[task][split][document]) or []
            stops = options.get("until") or ()
            key = (
                int(options.get("max_new_tokens") or self.max_new_tokens),
                (stops,) if isinstance(stops, str) else tuple(stops),
            )
            item = Item(str(number), context.replace("<image>", "").strip(), tuple(map(_picture, pictures)))
            groups.setdefault(key, []).append(item)
        for (count, stops), items in groups.items():
            self.answerer.max_new_tokens = count
            for batch in batches(items, self.batch_size):
                for item, text in zip(batch, self.answerer.answer(batch), strict=True):
                    ends = [text.find(stop) for stop in stops if stop and stop in text]
                    found[int(item.id)] = text[: min(ends, default=len(text))]
        return [found[number] for number in range(len(requests))]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "the model zinit answers tasks of the kind generate_until, not loglikelihood"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("the model zinit answers single questions, not rounds of them")


def _picture(image: Any) -> Picture:
    """Of a PIL image."""
    content = io.BytesIO()
    as_rgb(image).save(content, "PNG")
    encoded = base64.b64encode(content.getvalue()).decode()
    return Picture(hashlib.sha256(content.getvalue()).hexdigest()[:16], encoded=encoded)
