"""Encoders: the features are transformers' own, and an image is encoded once, in memory and on disk."""

import json

import pytest
import torch
from PIL import Image
from tiny_vision import ENCODERS, encoder_folder, encoder_model, picture, processor

from model.errors import UserError
from model.vision.config import FeatureConfig
from model.vision.encoders import load_encoder
from model.vision.features import Features


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """kind -> its folder; to be read only."""
    root = tmp_path_factory.mktemp("encoders")
    for kind in ENCODERS:
        encoder_folder(root / kind, kind)
    return root


def pixels_of(kind, path):
    return processor(kind)(Image.open(path), return_tensors="pt")["pixel_values"]


def hidden_states(model, pixels):
    with torch.no_grad():
        return model(pixels, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_are_hidden_states_of_transformers(folders, tmp_path, kind):
    paths = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 1, (90, 50))]
    encoder, model = load_encoder(folders / kind), encoder_model(kind)
    layers = (1, -1)
    tokens = "all" if kind == "siglip" else "patches"
    found = encoder.encode([Image.open(path) for path in paths], FeatureConfig(layers, tokens))
    for path, feature in zip(paths, found, strict=True):
        states = hidden_states(model, pixels_of(kind, path))
        expected = torch.cat([states[1], states[3]], -1)[0]
        torch.testing.assert_close(feature, expected if kind == "siglip" else expected[1:])
    assert feature.shape == (4, 48) and encoder.feature_size(FeatureConfig(layers, tokens)) == 48


def test_one_token_an_image(folders, tmp_path):
    path = picture(tmp_path / "a.png")
    for kind, tokens in (("clip", "class"), ("siglip", "mean")):
        (feature,) = load_encoder(folders / kind).encode([Image.open(path)], FeatureConfig((2,), tokens))
        state = hidden_states(encoder_model(kind), pixels_of(kind, path))[2][0]
        torch.testing.assert_close(feature[0], state[0] if tokens == "class" else state.mean(0))
    with pytest.raises(UserError, match="class token"):
        load_encoder(folders / "siglip").encode([Image.open(path)], FeatureConfig(tokens="class"))


def test_projected_features_are_those_of_v2(folders, tmp_path):
    """ln_post and the projection, on every token; red and blue swapped if asked."""
    path = picture(tmp_path / "a.png")
    red, green, blue = Image.open(path).split()
    encoder, model = load_encoder(folders / "clip"), encoder_model("clip")
    for order, image in (("rgb", Image.open(path)), ("bgr", Image.merge("RGB", (blue, green, red)))):
        config = FeatureConfig((-1,), "all", True, order)
        (feature,) = encoder.encode([Image.open(path)], config)
        pixels = processor("clip")(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            state = hidden_states(model, pixels)[-1]
            expected = model.visual_projection(model.vision_model.post_layernorm(state))[0]
        torch.testing.assert_close(feature, expected)
        assert feature.shape == (5, encoder.feature_size(config)) == (5, 16)
    with pytest.raises(UserError, match="no projection"):
        load_encoder(folders / "vit").feature_size(FeatureConfig((-1,), "all", True))


def test_a_blank_image_is_zero_behind_the_processor(folders):
    encoder = load_encoder(folders / "clip")
    config = FeatureConfig((-1,), "all", True)
    (expected,) = encoder.encode_pixels(torch.zeros(1, 3, 28, 28), config)
    assert torch.equal(encoder.blank(config), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_encoders_keep_the_dtype_of_their_files(tmp_path, dtype):
    encoder_model("vit").to(dtype).save_pretrained(tmp_path)
    processor("vit").save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert {p.dtype for p in encoder.model.parameters()} == {dtype}
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training
    (feature,) = encoder.encode([Image.new("RGB", (30, 30), "red")], FeatureConfig())
    assert feature.dtype == dtype


def test_the_fingerprint_knows_weights_and_processor(folders, tmp_path):
    first = load_encoder(folders / "clip").fingerprint
    assert load_encoder(folders / "clip").fingerprint == first
    encoder_folder(tmp_path / "other", "clip", seed=1)
    encoder_folder(tmp_path / "size", "clip")
    processor("clip", 42).save_pretrained(tmp_path / "size")
    assert len({first, *(load_encoder(tmp_path / name).fingerprint for name in ("other", "size"))}) == 3


def test_an_image_is_encoded_once_whatever_its_name(folders, tmp_path):
    paths = [picture(tmp_path / f"{name}.png", seed) for name, seed in (("a", 0), ("b", 1), ("again", 0))]
    for cache in (None, tmp_path / "cache"):
        features = Features(load_encoder(folders / "dinov2"), FeatureConfig((1, 3), "all"), cache)
        first, second, again = features.of([*paths[:2], paths[2]])
        assert features.counted == 2 and torch.equal(first, again) and not torch.equal(first, second)
        features.prepare(paths)
        assert features.counted == 2
    kept = Features(load_encoder(folders / "dinov2"), FeatureConfig((1, 3), "all"), tmp_path / "cache")
    assert torch.equal(kept.of(paths[:1])[0], first) and kept.counted == 0


def test_the_cache_is_of_one_encoder_choice_and_content(folders, tmp_path):
    path, cache = picture(tmp_path / "a.png"), tmp_path / "cache"

    def count(kind="dinov2", config=FeatureConfig(), convert=False):  # noqa: B008
        features = Features(load_encoder(folders / kind), config, cache, convert)
        features.of([path])
        return features.counted

    assert (count(), count()) == (1, 0)
    assert count("clip") == count(config=FeatureConfig(tokens="all")) == count(convert=True) == 1
    picture(tmp_path / "a.png", 1)
    assert (count(), count()) == (1, 0)
    for damage in (lambda content: content[:50], lambda content: content[:-2] + b"\x01\x02"):
        for file in cache.rglob("*.safetensors"):
            file.write_bytes(damage(file.read_bytes()))  # damaged files are made again
        assert (count(), count()) == (1, 0)


def test_features_do_not_depend_on_what_else_is_encoded(folders, tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(5)]
    together = Features(load_encoder(folders / "dinov2"), FeatureConfig(tokens="all")).of(paths)
    alone = Features(load_encoder(folders / "dinov2"), FeatureConfig(tokens="all")).of(paths[3:4])
    assert torch.equal(together[3], alone[0])


def edit(folder, file, **changes):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


def test_folders_that_are_no_encoder(tmp_path):
    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            load_encoder(tmp_path)
        assert "\n" not in str(error.value)

    refused("no config.json")
    encoder_folder(tmp_path, "vit")
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "kept")
    refused("no preprocessor_config.json")
    (tmp_path / "kept").rename(tmp_path / "preprocessor_config.json")
    edit(tmp_path, "config.json", model_type="swin")
    refused("'swin'")
    edit(tmp_path, "config.json", model_type="vit", num_hidden_layers=4)
    refused("lacks .*layers?.3")
    edit(tmp_path, "config.json", num_hidden_layers=3)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused("cannot be read")


def test_layers_that_an_encoder_does_not_have(folders):
    with pytest.raises(UserError, match="hidden states 0 to 3, and layer 4"):
        load_encoder(folders / "vit").encode([Image.new("RGB", (9, 9))], FeatureConfig((4,)))
    with pytest.raises(UserError, match="rgb or bgr"):
        FeatureConfig(channel_order="brg")
