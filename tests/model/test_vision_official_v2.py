"""The published LLaMA-Adapter V2, against its equations: a small random file with every part at non-zero values."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_models import hf_model, meta_directory, pack, prompts
from tiny_vision import encoder_folder, picture
from torch.nn.functional import silu

from model import generate
from model.errors import UserError
from model.loading import load_base
from model.vision.adapter import VisualAdapter
from model.vision.config import FeatureConfig
from model.vision.encoders import load_encoder
from model.vision.features import Features
from model.vision.files import load_adapter, open_adapter
from zinit_kernels import checkpoints

LAYERS, WIDTH, HEADS, RANK, QUERIES, BLOCKS, VISUAL, FEATURES = 4, 64, 8, 3, 5, 2, 32, 16
LINEARS = {"attention": ("wq", "wk", "wv", "wo"), "feed_forward": ("w1", "w2", "w3")}
BIASED = ("wq", "wo", "w1", "w2", "w3")
VISUAL_HEADS = 16
KINDS = {"BIAS": (True, False), "LORA-BIAS": (True, True), "CAPTION": (False, False)}


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """A LLaMA in Meta's files, and its weights."""
    path = tmp_path_factory.mktemp("meta")
    meta_directory(path, hf_model("llama"))
    return SimpleNamespace(path=path, weights=torch.load(path / "consolidated.00.pth"))


def random(*shape, seed, scale=0.3):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def official(meta, kind):
    """The tensors of a file, none of them at its initial value."""
    bias, lora = KINDS[kind]
    sizes = {
        name: meta.weights[f"layers.0.{group}.{name}.weight"].shape
        for group, names in LINEARS.items()
        for name in names
    }
    state = {
        "adapter_query.weight": random((LAYERS - 1) * QUERIES, WIDTH, seed=1, scale=1.0),
        "visual_query.weight": random(QUERIES, VISUAL, seed=2, scale=1.0),
        "llama.norm.weight": 1 + random(WIDTH, seed=3),
    }

    def linear(name, outs, ins, seed):
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            random(outs, ins, seed=seed),
            random(outs, seed=seed + 500),
        )

    def norm(name, size, seed):
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            1 + random(size, seed=seed),
            random(size, seed=seed + 500),
        )

    linear("clip_proj", VISUAL, FEATURES, 4)
    norm("clip_proj_norm", VISUAL, 5)
    linear("visual_proj", WIDTH, VISUAL, 6)
    norm("visual_proj_norm", WIDTH, 7)
    for block in range(BLOCKS):
        prefix, seed = f"visual_blocks.{block}", 20 + 10 * block
        norm(f"{prefix}.norm1", VISUAL, seed)
        linear(f"{prefix}.attn.qkv", 3 * VISUAL, VISUAL, seed + 1)
        linear(f"{prefix}.attn.proj", VISUAL, VISUAL, seed + 2)
        norm(f"{prefix}.norm2", VISUAL, seed + 3)
        linear(f"{prefix}.mlp.fc1", 4 * VISUAL, VISUAL, seed + 4)
        linear(f"{prefix}.mlp.fc2", VISUAL, 4 * VISUAL, seed + 5)
    for layer in range(LAYERS):
        prefix, seed = f"llama.layers.{layer}", 100 + 40 * layer
        state[f"{prefix}.attention.gate"] = random(1, HEADS, 1, 1, seed=seed, scale=1.0) * (layer > 0)
        state[f"{prefix}.attention_norm.weight"] = 1 + random(WIDTH, seed=seed + 1)
        state[f"{prefix}.ffn_norm.weight"] = 1 + random(WIDTH, seed=seed + 2)
        if lora:
            state[f"{prefix}.attention.new_gate"] = torch.full((1, 1, 1, 1), 0.7 + 0.2 * layer)
        for group, names in LINEARS.items():
            for place, name in enumerate(names):
                outs, ins = sizes[name]
                if bias and name in BIASED:
                    state[f"{prefix}.{group}.{name}.bias"] = random(outs, seed=seed + 3 + place)
                if lora:
                    state[f"{prefix}.{group}.lora_{name}_l1.weight"] = random(
                        RANK, ins, seed=seed + 10 + place, scale=0.2
                    )
                    state[f"{prefix}.{group}.lora_{name}_l2.weight"] = random(
                        outs, RANK, seed=seed + 20 + place, scale=0.2
                    )
    return state


def write(path, state, kind):
    bias, lora = KINDS[kind]
    torch.save({"model": state, "config": {"w_bias": bias, "w_lora": lora, "lora_rank": 16}}, path)
    return path


# The equations, in Meta's layout of heads and neighbouring rotary pairs


def layer_norm(x, state, name):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return normed * state[f"{name}.weight"] + state[f"{name}.bias"]


def affine(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def visual_prompts(state, features):
    """[T, FEATURES] -> [QUERIES, WIDTH]."""
    tokens = layer_norm(affine(features, state, "clip_proj"), state, "clip_proj_norm")
    x = torch.cat([state["visual_query.weight"], tokens])
    for block in range(BLOCKS):
        name = f"visual_blocks.{block}"
        qkv = affine(layer_norm(x, state, f"{name}.norm1"), state, f"{name}.attn.qkv")
        query, key, value = (
            part.unflatten(-1, (VISUAL_HEADS, -1)).transpose(0, 1) for part in qkv.chunk(3, -1)
        )
        weights = torch.softmax(query @ key.mT / math.sqrt(VISUAL / VISUAL_HEADS), -1)
        x = x + affine((weights @ value).transpose(0, 1).flatten(1), state, f"{name}.attn.proj")
        hidden = affine(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + affine(hidden, state, f"{name}.mlp.fc2")
    return layer_norm(affine(x[:QUERIES], state, "visual_proj"), state, "visual_proj_norm")


def rms_norm(x, weight):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotated(heads):
    """[T, H, D], neighbouring pairs turned by position / 10000 ** (2 i / D)."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    angles = torch.outer(torch.arange(len(heads)).float(), 10000.0 ** -(torch.arange(0, 8, 2) / 8))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)


def by_the_equations(meta, state, tokens, features):
    """Logits [T, vocabulary] of one sequence about one image."""
    base = meta.weights
    visual = visual_prompts(state, features)

    def linear(x, layer, name, plain=False):
        out = x @ base[f"layers.{layer}.{name}.weight"].T
        if plain:
            return out
        group, short = name.split(".")
        prefix = f"llama.layers.{layer}.{group}"
        if f"{prefix}.{short}.bias" in state:
            out = out + state[f"{prefix}.{short}.bias"]
        if f"{prefix}.lora_{short}_l1.weight" in state:
            out = (
                out
                + x
                @ state[f"{prefix}.lora_{short}_l1.weight"].T
                @ state[f"{prefix}.lora_{short}_l2.weight"].T
            )
        return out

    x = base["tok_embeddings.weight"][tokens]
    unseen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in range(LAYERS):
        h = rms_norm(x, state[f"llama.layers.{layer}.attention_norm.weight"])
        query, key, value = (
            linear(h, layer, f"attention.{name}").unflatten(-1, (HEADS, -1)) for name in ("wq", "wk", "wv")
        )
        query, key = rotated(query).transpose(0, 1), rotated(key).transpose(0, 1)
        scores = (query @ key.mT / math.sqrt(WIDTH / HEADS)).masked_fill(unseen, -torch.inf)
        out = scores.softmax(-1) @ value.transpose(0, 1)
        if layer > 0:
            rows = slice((layer - 1) * QUERIES, layer * QUERIES)
            prompt = state["adapter_query.weight"][rows] + visual
            prompt_key, prompt_value = (
                linear(prompt, layer, f"attention.{name}", plain=True)
                .unflatten(-1, (HEADS, -1))
                .transpose(0, 1)
                for name in ("wk", "wv")
            )
            gate = state[f"llama.layers.{layer}.attention.gate"][0].tanh()
            gate = gate * state.get(f"llama.layers.{layer}.attention.new_gate", torch.ones(1, 1, 1, 1))[0]
            out = out + gate * ((query @ prompt_key.mT / math.sqrt(WIDTH / HEADS)).softmax(-1) @ prompt_value)
        x = x + linear(out.transpose(0, 1).flatten(1), layer, "attention.wo")
        h = rms_norm(x, state[f"llama.layers.{layer}.ffn_norm.weight"])
        up = silu(linear(h, layer, "feed_forward.w1")) * linear(h, layer, "feed_forward.w3")
        x = x + linear(up, layer, "feed_forward.w2")
    return rms_norm(x, state["llama.norm.weight"]) @ base["output.weight"].T


IMAGES = [random(7, FEATURES, seed=900 + i, scale=1.0) for i in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_computes_what_the_equations_say(meta, tmp_path, kind):
    state = official(meta, kind)
    base = load_base(meta.path).freeze()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model, adapter = open_adapter(write(tmp_path / "v2.pth", state, kind), base, prompt_length=QUERIES)
    texts, images = prompts([6, 4, 5]), [0, 1, 0]
    tokens, cu_seqlens = pack(texts)
    seen = adapter.with_images(IMAGES, [(image,) for image in images])
    found = model(tokens, seen, cu_seqlens=cu_seqlens).split([len(text) for text in texts])
    for text, image, logits in zip(texts, images, found, strict=True):
        expected = by_the_equations(meta, state, text, IMAGES[image])
        torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    shared = {weight.data_ptr() for weight in base.parameters() if weight.dim() > 1}
    assert {
        weight.data_ptr() for weight in model.parameters() if weight.dim() > 1
    } == shared  # nothing is copied
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "part", ["attention.wq.bias", "attention.lora_wk_l2.weight", "attention.new_gate", "ffn_norm.weight"]
)
@torch.no_grad()
def test_the_equations_see_every_part(meta, part):
    """The comparison is of worth only if each part changes the answer."""
    state, text = official(meta, "LORA-BIAS"), prompts([6])[0]
    expected = by_the_equations(meta, state, text, IMAGES[0])
    state[f"llama.layers.2.{part}"] = 0 * state[f"llama.layers.2.{part}"]
    assert not torch.allclose(by_the_equations(meta, state, text, IMAGES[0]), expected, atol=2e-2)


@torch.no_grad()
def test_the_published_conventions(meta, tmp_path):
    """BGR, all tokens of CLIP's projection, and a blank image where there is none."""
    base, state = load_base(meta.path).freeze(), official(meta, "BIAS")
    model, adapter = open_adapter(write(tmp_path / "v2.pth", state, "BIAS"), base, prompt_length=QUERIES)
    assert isinstance(adapter, VisualAdapter)
    assert adapter.feature_config == FeatureConfig((-1,), "all", True, "bgr")
    text = prompts([6])[0]
    tokens, cu_seqlens = pack([text])
    with pytest.raises(UserError, match="blank image"):
        adapter.about([()])
    encoder_folder(tmp_path / "clip", "clip")
    adapter.source = Features(load_encoder(tmp_path / "clip"), adapter.feature_config)
    blank = adapter.source.encoder.encode_pixels(torch.zeros(1, 3, 28, 28), adapter.feature_config)[0]
    found = model(tokens, adapter.about([()]), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(found, by_the_equations(meta, state, text, blank), rtol=2e-3, atol=2e-3)


def test_generate_takes_it(meta, tmp_path, capsys):
    from tiny_models import word_tokenizer

    word_tokenizer(meta.path)
    encoder_folder(tmp_path / "clip", "clip")
    write(tmp_path / "v2.pth", official(meta, "LORA-BIAS"), "LORA-BIAS")
    words = [
        "--base",
        meta.path,
        "--adapter",
        tmp_path / "v2.pth",
        "--prompt-length",
        QUERIES,
        "--prompt",
        "the quick",
    ]
    words += ["--max-new-tokens", 4, "--temperature", 0, "--encoder", tmp_path / "clip"]
    answers = []
    for seed in range(2):
        generate.main([str(word) for word in (*words, "--image", picture(tmp_path / f"{seed}.png", seed))])
        answers.append(capsys.readouterr().out)
    assert all(answers)


def test_evaluate_takes_it(meta, tmp_path, monkeypatch):
    """With the biases, factors and norms that the file adds to the base."""
    from tiny_models import word_tokenizer

    from evaluate import models

    word_tokenizer(meta.path)
    path = write(tmp_path / "v2.pth", official(meta, "LORA-BIAS"), "LORA-BIAS")
    monkeypatch.setattr(models, "open_adapter", partial(open_adapter, prompt_length=QUERIES))
    answerer = models.load(meta.path, path, 4, models.Wording(), dtype=None, device="cpu")
    expected, _ = open_adapter(path, load_base(meta.path).freeze(), QUERIES)
    tokens = torch.tensor([[1, 2, 3]])
    assert isinstance(answerer.adapter, VisualAdapter)
    assert torch.equal(answerer.model(tokens), expected(tokens))
    assert not torch.equal(answerer.model(tokens), load_base(meta.path)(tokens))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("clip_proj_norm.bias"), "lacks tokens_norm.bias"),
        (lambda s: s.pop("visual_query.weight"), "without query"),
        (lambda s: s.update({"visual_blocks.0.attn.more": torch.ones(1)}), "unknown blocks.0.attn.more"),
        (lambda s: s.update({"visual_proj.weight": torch.ones(WIDTH + 1, VISUAL)}), "out.weight has shape"),
        (lambda s: s.update({"visual_blocks.500.norm1.weight": torch.ones(VISUAL)}), "no published size"),
        (lambda s: s.pop("llama.layers.1.attention.lora_wq_l1.weight"), "one LoRA factor without the other"),
        (lambda s: s.update({"llama.layers.1.attention.wq.bias": torch.ones(3)}), r"shape \(3,\)"),
        (lambda s: s.update({"llama.layers.9.ffn_norm.weight": torch.ones(WIDTH)}), "layers.9.post_attention"),
        (lambda s: s.update({"llama.norm.weight": torch.full((WIDTH,), torch.inf)}), "finite"),
        (lambda s: s.update({"llama.output.bias": torch.ones(160)}), "llama.output.bias, which no published"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole(meta, tmp_path, change, said):
    state = official(meta, "LORA-BIAS")
    change(state)
    path = write(tmp_path / "v2.pth", state, "LORA-BIAS")
    with pytest.raises(UserError, match=said) as error:
        open_adapter(path, load_base(meta.path), prompt_length=QUERIES)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_read_it_whole_says_so(meta, tmp_path):
    path = write(tmp_path / "v2.pth", official(meta, "BIAS"), "BIAS")
    with pytest.raises(UserError, match="not the whole adapter"):
        load_adapter(path, load_base(meta.path), prompt_length=QUERIES)


def test_imagebind_is_named(tmp_path, capsys):
    from zinit_kernels import inspect

    state = {
        "prefix_query.weight": torch.zeros(LAYERS, WIDTH),
        "image_bind_proj.weight": torch.zeros(WIDTH, 8),
    }
    state |= {f"llama.layers.{layer}.attention.gate": torch.zeros(1, HEADS, 1, 1) for layer in range(LAYERS)}
    torch.save({"model": state}, tmp_path / "imagebind.pth")
    assert inspect.main([str(tmp_path / "imagebind.pth")]) == 2
    said = capsys.readouterr().err
    assert "ImageBind-LLM" in said and said.count("\n") == 1
    with pytest.raises(checkpoints.CheckpointError, match="one prompt a layer"):
        checkpoints.load_adapter(tmp_path / "imagebind.pth")
