"""VTAB-1k (Zhai et al., arXiv 1910.04867): top-1 accuracy in 19 image tasks with 1,000 training images each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

GROUPS: dict[str, dict[str, int]] = {  # group -> task (by the names of TensorFlow Datasets' splits) -> classes
    "natural": {
        "caltech101": 102, "cifar100": 100, "dtd": 47, "flowers102": 102, "pets": 37, "svhn": 10, "sun397": 397,
    },
    "specialized": {"patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "retinopathy": 5},
    "structured": {
        "clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16,
        "smallnorb_azi": 18, "smallnorb_ele": 9,
    },
}  # fmt: skip
ALIASES = {  # other names that the tasks' folders have
    "cifar": "cifar100", "oxford_flowers102": "flowers102", "oxford_iiit_pet": "pets",
    "diabetic_retinopathy": "retinopathy", "kitti_dist": "kitti", "dsprites_location": "dsprites_loc",
    "dsprites_orientation": "dsprites_ori", "smallnorb_azimuth": "smallnorb_azi",
    "smallnorb_elevation": "smallnorb_ele",
}  # fmt: skip
TRAIN, VALIDATION = 800, 200  # images; the chosen setting is trained again on all 1,000


class Score(NamedTuple):
    """In percent: mean over the seeds of each task, mean of the tasks of each group, mean of the groups.

    groups holds only those whose every task was run; overall is None unless there are all three.
    """

    tasks: dict[str, float]
    groups: dict[str, float]
    overall: float | None


def score(accuracies: Mapping[str, Sequence[float]]) -> Score:
    """Args: task -> test accuracy, in percent, of each seed. Names of GROUPS and of ALIASES count in the groups.

    Raises:
        ValueError: a task without accuracies or under two names, or an accuracy outside 0 to 100.
    """
    names = [ALIASES.get(task, task) for task in accuracies]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{twice} is there under two names")
    accuracies = dict(zip(names, accuracies.values(), strict=True))
    for task, values in accuracies.items():
        if not values or not all(0 <= value <= 100 for value in values):
            raise ValueError(f"{task}: expected accuracies from 0 to 100, got {list(values)}")
    tasks = {task: sum(values) / len(values) for task, values in accuracies.items()}
    groups = {
        group: sum(tasks[name] for name in names) / len(names)
        for group, names in GROUPS.items()
        if names.keys() <= tasks.keys()
    }
    overall = sum(groups.values()) / len(groups) if len(groups) == len(GROUPS) else None
    return Score(tasks, groups, overall)
