"""The earlier name of `recipe` and `train_loop`."""

from .recipe import Recipe
from .train_loop import StepReport, batch_loss, evaluate, make_optimizer, train

__all__ = ["Recipe", "StepReport", "batch_loss", "evaluate", "make_optimizer", "train"]
