"""Makes the model `zinit` known to lmms-eval, through the entry point that it looks for.

    pip install lmms-eval 'zinit-kernels[evaluate]'
    python -m lmms_eval --model zinit --model_args base=DIR,adapter=FILE,encoder=DIR --tasks mme,pope

lmms-eval loads `manifest` by itself in every program; the model is imported when it is asked for.
"""

from __future__ import annotations

import importlib.util

from lmms_eval.models.registry_v2 import ModelManifest

NAME = "zinit"


def manifest() -> list[ModelManifest]:
    """What lmms-eval registers: the model's name, and the class that it imports for it.

    Nothing in a checkout that is not installed: lmms-eval needs Hugging Face's `evaluate`, and the checkout's folder of
    that name cannot be imported beside it.
    """
    if importlib.util.find_spec("zinit_kernels.evaluate") is None:
        return []
    return [ModelManifest(model_id=NAME, simple_class_path="zinit_kernels.evaluate.lmms_model.ZeroInit")]
