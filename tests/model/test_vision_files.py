"""Adapters with a visual part on disk: what is written is read again, and what does not fit is refused."""

import dataclasses
import json

import pytest
import torch
from tiny_runs import make_base

from model.adapter import LlamaAdapter
from model.adapter_files import load_adapter as load_text_adapter
from model.config import AdapterConfig
from model.errors import UserError
from model.fingerprint import adapter_metadata
from model.vision.adapter import VisualAdapter
from model.vision.config import FeatureConfig, VisualConfig
from model.vision.files import load_adapter, save_adapter
from zinit_kernels import checkpoints

KINDS = {
    "bottleneck": (VisualConfig("bottleneck", 12, 6), FeatureConfig((1, 3))),
    "queries": (
        VisualConfig("queries", 8, 16, blocks=2, heads=4, standardise=True, blank_image=True),
        FeatureConfig(tokens="all", projected=True, channel_order="bgr"),
    ),
}


@pytest.fixture(scope="module")
def base():
    return make_base()


def visual_adapter(base, kind):
    adapter = VisualAdapter(base.config, AdapterConfig(3, 2), *KINDS[kind], torch.Generator().manual_seed(1))
    with torch.no_grad():
        for tensor in adapter.state_dict().values():
            tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2)))
    adapter.encoder_fingerprint = "abc"
    return adapter


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(base, tmp_path, kind):
    adapter = visual_adapter(base, kind)
    save_adapter(tmp_path / "a.safetensors", adapter, base.config, metadata=adapter_metadata(base))
    random = torch.random.get_rng_state()
    found = load_adapter(tmp_path / "a.safetensors", base)
    assert torch.equal(random, torch.random.get_rng_state())
    assert (found.visual_config, found.feature_config) == KINDS[kind] and found.config == adapter.config
    assert found.encoder_fingerprint == "abc"
    assert found.state_dict().keys() == adapter.state_dict().keys()
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_text_adapters_load_as_before(base, tmp_path):
    adapter = LlamaAdapter(base.config, AdapterConfig(3, 2))
    save_adapter(tmp_path / "a.safetensors", adapter, base.config)
    found = load_adapter(tmp_path / "a.safetensors", base)
    assert type(found) is LlamaAdapter and torch.equal(found.prompts, adapter.prompts)


def test_programs_without_images_refuse_it(base, tmp_path):
    save_adapter(tmp_path / "a.safetensors", visual_adapter(base, "queries"), base.config)
    with pytest.raises(UserError, match="not the whole adapter"):
        load_text_adapter(tmp_path / "a.safetensors", base.config)
    with pytest.raises(checkpoints.CheckpointError, match="would be lost"):
        checkpoints.save_adapter(
            tmp_path / "b.pth", checkpoints.load_adapter(tmp_path / "a.safetensors"), "official-v1"
        )
    with pytest.raises(UserError, match="would be lost"):
        save_adapter(tmp_path / "c.pth", visual_adapter(base, "queries"), base.config, "official-v1")
    assert not (tmp_path / "b.pth").exists() and not (tmp_path / "c.pth").exists()


def changed(what, value):
    def change(checkpoint):
        if what == "extras":
            return dataclasses.replace(checkpoint, extras=value(dict(checkpoint.extras)))
        content = json.loads(checkpoint.metadata[what]) | value
        return dataclasses.replace(checkpoint, metadata=checkpoint.metadata | {what: json.dumps(content)})

    return change


def without(name):
    return changed("extras", lambda extras: {key: value for key, value in extras.items() if key != name})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("projection.query"), "lacks projection.query"),
        (changed("extras", lambda e: e | {"projection.more": torch.ones(1)}), "unknown projection.more"),
        (changed("extras", lambda e: e | {"projection.query": torch.ones(3, 9)}), r"shape \(3, 9\)"),
        (changed("extras", lambda e: e | {"standardise.mean": torch.full((8,), torch.nan)}), "finite"),
        (changed("extras", lambda e: e | {"projection.query": torch.ones(3, 16, dtype=torch.int32)}), "finite"),
        (changed("visual", {"width": 1 << 40}), "width must be"),
        (changed("visual", {"blocks": 1 << 15}), "blocks must be"),
        (changed("visual", {"width": "16"}), "width must be"),
        (changed("visual", {"mlp_ratio": 1e308}), "mlp_ratio"),
        (changed("visual", {"standardise": 1}), "true or false"),
        (changed("visual", {"later": 1}), "unknown field 'later'"),
        (changed("visual", {"kind": ["queries"]}), "kind must be"),
        (changed("features", {"layers": [[1]]}), "layers must be"),
        (changed("features", {"tokens": {}}), "tokens must be"),
        (lambda c: dataclasses.replace(c, metadata={}), "visual"),
        (lambda c: dataclasses.replace(c, metadata=c.metadata | {"visual": "["}), "visual"),
    ],
)  # fmt: skip
def test_damaged_files(base, tmp_path, change, said):
    save_adapter(tmp_path / "a.safetensors", visual_adapter(base, "queries"), base.config)
    checkpoint = checkpoints.load_adapter(tmp_path / "a.safetensors")
    checkpoints.save_adapter(tmp_path / "b.safetensors", change(checkpoint))
    with pytest.raises(UserError, match=said) as error:
        load_adapter(tmp_path / "b.safetensors", base)
    assert "b.safetensors" in str(error.value) and "\n" not in str(error.value)
