"""What README.md says can be run, runs; the files and make targets it names are there."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_example_runs(code):
    names = {}
    exec(code, names)
    if "answers" in names:
        check_answers(names)
        return
    gates = [names["gate"]] if "gate" in names else named_gates(names["model"])
    assert gates and all(gate.grad.isfinite().all() and gate.grad.abs().sum() > 0 for gate in gates)


def check_answers(names):
    """Those of the same requests, one at a time."""
    found = [(answer.prompt_ids, answer.generated_tokens) for answer in names["answers"].values()]
    for request in names["requests"]:
        tokens = names["model"].generate(torch.tensor([request]), names["generation"])[0].tolist()
        assert (request, tokens[len(request) :]) in found
    assert len(found) == len(names["requests"])


def named_gates(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith("gate")]


def test_the_tree_is_there():
    tree = README.split("## The tree")[1].split("\n\n")[1]
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE))
    assert named and named <= set(targets), named - set(targets)


def test_the_public_names_are_documented():
    import zinit_kernels

    for name in zinit_kernels.__all__:
        assert f"`{name}" in README, f"{name} is exported but not in README.md"
        assert getattr(zinit_kernels, name).__doc__
