"""The benchmarks of the LLaMA-Adapter paper (arXiv 2303.16199), by their official rules. Run as `python -m evaluate`.

`scorers` holds the rules: pure functions that serve any model's answers.
"""

from typing import NoReturn


def __getattr__(name: str) -> NoReturn:
    if name in ("load", "combine", "Metric", "EvaluationModule", "evaluator", "config"):
        raise ImportError(
            f"{__file__} is no part of Hugging Face's evaluate, which has {name}: run this from another folder than "
            "the checkout of zinit_kernels"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
