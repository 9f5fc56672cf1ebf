"""A frozen model with a zero-init adapter, in EleutherAI's lm-evaluation-harness.

    python -m zinit_kernels.integrations.lm_eval run --model zinit --model_args pretrained=DIR,adapter=FILE \\
        --tasks arc_challenge,hellaswag,mmlu,truthfulqa_mc2 --batch_size 8

is the harness's own command with one model more, `zinit`; those are the harness's names for the tasks of the paper's
Table 10 (arXiv 2303.16199). In Python, `lm_eval.simple_evaluate(ZeroInitLM(DIR, adapter=FILE), tasks=...)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .transformers import load_adapter


@register_model("zinit")
class ZeroInitLM(HFLM):
    """The harness's `hf` model with an adapter. While all gates are 0, its scores on a CPU are those of `hf` bit for
    bit; elsewhere they differ by rounding.

    Args:
        pretrained, options: as for `hf`: a directory or a loaded model; dtype, device, batch_size, ...
        adapter: a folder of `save_adapter`, or an adapter file of any format that `zinit_kernels.checkpoints` reads.
        prompt_length, gate_activation: as for `zinit_kernels.checkpoints.load_adapter`.

    Raises:
        ValueError: no adapter there; said before the model is loaded. CheckpointError: one that does not fit.
    """

    def __init__(
        self,
        pretrained: Any,
        adapter: str | Path | None = None,
        prompt_length: int | None = None,
        gate_activation: str | None = None,
        **options: Any,
    ) -> None:
        if adapter is None or not Path(adapter).exists():
            raise ValueError(
                f"adapter must be an adapter's file or folder, and there is none at {str(adapter)!r}; "
                "without an adapter, --model hf evaluates the base"
            )
        super().__init__(pretrained, **options)
        load_adapter(self.model, adapter, prompt_length=prompt_length, gate_activation=gate_activation)


if __name__ == "__main__":
    cli_evaluate()
