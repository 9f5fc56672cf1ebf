"""The model that lmms-eval knows by the name zinit, against stand-ins for lmms-eval's classes."""

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
from repository import ROOT
from tiny_runs import make_folder

from evaluate import models


class Lmms:
    def __init__(self):
        self.task_dict = {}


@pytest.fixture
def lmms_eval(monkeypatch):
    """lmms-eval has some 60 dependencies; these are the two names that the plug-in takes from it."""
    manifest = SimpleNamespace
    for name, held in (
        ("lmms_eval", {}), ("lmms_eval.api", {}), ("lmms_eval.api.model", {"lmms": Lmms}), ("lmms_eval.models", {}),
        ("lmms_eval.models.registry_v2", {"ModelManifest": manifest}),
    ):  # fmt: skip
        module = ModuleType(name)
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("evaluate.lmms_model", "zinit_kernels.integrations.lmms_eval"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("evaluate.lmms_model", "zinit_kernels.integrations.lmms_eval"):
        sys.modules.pop(name, None)


def request(context, task="t", document=0, pictures=None, **options):
    return SimpleNamespace(args=(context, options, pictures, document, task, "test"))


def test_the_entry_point_registers_the_model_where_the_package_is_installed(lmms_eval, monkeypatch):
    plugin = importlib.import_module("zinit_kernels.integrations.lmms_eval")
    line = 'zinit = "zinit_kernels.integrations.lmms_eval:manifest"'
    assert f'[project.entry-points."lmms_eval.models"]\n{line}\n' in (ROOT / "pyproject.toml").read_text()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plugin.manifest() == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (found,) = plugin.manifest()
    assert found.model_id == "zinit"
    module, name = found.simple_class_path.rsplit(".", 1)
    assert module.startswith("zinit_kernels.evaluate.")
    assert hasattr(importlib.import_module(module.removeprefix("zinit_kernels.")), name)


def test_requests_are_answered_in_order_in_batches_of_alike_options(lmms_eval, monkeypatch):
    asked = []

    class Echo:
        max_new_tokens = 0

        def answer(self, items):
            asked.append(
                (self.max_new_tokens, [item.question for item in items], [len(i.pictures) for i in items])
            )
            return [f"{item.question} it is\n\nand more" for item in items]

    monkeypatch.setattr(models, "load", lambda *_: Echo())
    model = importlib.import_module("evaluate.lmms_model").ZeroInit("base", batch_size="2")
    model.task_dict = {"t": {"test": [{"image": 0}]}}
    image = pytest.importorskip("PIL.Image").new("L", (2, 2))
    requests = [
        request("a", max_new_tokens=4, until="\n\n"), request("<image> b", pictures=lambda doc: [image]),
        request("c", max_new_tokens=4, until=["\n\n", " is"]), request("d", max_new_tokens=4, until="\n\n"),
        request("e", pictures=lambda doc: [image]),
    ]  # fmt: skip
    assert model.generate_until(requests) == [
        "a it is",
        "b it is\n\nand more",
        "c it",
        "d it is",
        "e it is\n\nand more",
    ]
    assert asked == [(4, ["a", "d"], [0, 0]), (128, ["b", "e"], [1, 1]), (4, ["c"], [0])]
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until|single questions"):
            method([])
    with pytest.raises(ValueError, match="no option pretrained"):
        type(model)("base", pretrained="x")


def test_a_tiny_base_answers(lmms_eval, tmp_path):
    base = make_folder(tmp_path) / "base"
    model = importlib.import_module("evaluate.lmms_model").ZeroInit(
        str(base), device="cpu", max_new_tokens=3, brief="True"
    )
    assert model.answerer.wording.brief
    (answer,) = model.generate_until([request("Is it?")])
    (same,) = model.answerer.answer([SimpleNamespace(id="0", question="Is it?", pictures=())])
    assert answer == same


def test_hugging_faces_evaluate_is_not_taken_for_this_folder():
    import evaluate

    with pytest.raises(ImportError, match="no part of Hugging Face's evaluate"):
        evaluate.load  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'x'"):
        evaluate.x  # noqa: B018
