"""Mutated files of every kind: read, or refused in one printable sentence; never another exception, never a hang.

A small part of what was run while the readers were written (50,000 files, with a limit on memory and time).
"""

import json
import random
import struct

import pytest
import torch
from adapter_files import model_state, ours, put, sharded
from safetensors.torch import load_file
from tiny_models import hf_directory, hf_model, meta_directory

from model.adapter_files import load_adapter as load_for_model
from model.config import LlamaConfig
from model.errors import UserError
from model.loading import load_base
from zinit_kernels.checkpoints import WRITABLE, CheckpointError, save_adapter
from zinit_kernels.checkpoints.adapter import Told
from zinit_kernels.checkpoints.formats import identify
from zinit_kernels.inspect import describe

VALUES = [
    None, True, False, 0, 1, -1, 8, 2**31, 10**12, 10**300, 0.5, float("nan"), float("inf"), "", "no", "4", "2,3,4,5",
    "\x1b[31m", "a\nb", "\ud800", "../x", "/etc/hostname", [], {}, [1], [2, 2], [10**9, 10**9], [0, 10**12],
    [[[[[1]]]]], {"a": 1}, "F8_E4M3", "F16", "I64", "BOOL", "llama", "mistral", "llama3",
]  # fmt: skip
NAMES = [
    "x", "\x1b[2J", "\ud800", "a\0b", "layers.9999.attention.gate", "adapter_query.weight", "extra.prompts", "prompts",
    "transformer.h.9999.attn.gating_factor", "model.layers.7.self_attn.zinit.gate",
    "model.layers.999.mlp.up_proj.weight",
    "rope_scaling", "rope_parameters", "quantization_config", "use_scaled_rope", "sliding_window",
]  # fmt: skip
CHANGES = [
    lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t > 0,
    lambda t: t.to(torch.complex64), lambda t: t.to(torch.int64), lambda t: t.double() * 1e300, lambda t: t[None],
    lambda t: t.flatten()[:0], lambda t: t.flatten(), lambda t: t.flatten()[0], lambda t: t * torch.nan,
    lambda t: t.half(), lambda t: torch.ones(1).expand(10**11), lambda t: torch.nn.Parameter(t),
    lambda t: [t], lambda t: None,
]  # fmt: skip
CONFIG = LlamaConfig(40, 32, 24, 6, 4, 4, 8)


def inner(content):
    """Every object and list of JSON, itself included."""
    yield content
    for value in content.values() if isinstance(content, dict) else content:
        if isinstance(value, (dict, list)) and value:
            yield from inner(value)


def mutate_json(content, chance):
    for _ in range(chance.choice([1, 1, 2])):
        place = chance.choice(list(inner(content)))
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = chance.choice(keys) if keys else None
        roll = chance.random()
        if roll < 0.6 and key is not None:
            place[key] = chance.choice(VALUES)
        elif roll < 0.8 and key is not None:
            del place[key]
        elif isinstance(place, dict):
            place[chance.choice(NAMES)] = chance.choice([*VALUES, *(place[k] for k in keys)])


def mutate_state(state, chance):
    names = [
        name for name in state if any(part in name for part in ("gat", "query", "prompt", "wte", "norm"))
    ]
    name, roll = chance.choice(names or list(state)), chance.random()
    if roll < 0.6:
        state[name] = chance.choice(CHANGES)(state[name])
    elif roll < 0.75:
        del state[name]
    else:
        state[chance.choice(NAMES)] = state[name]


def mutate(path, chance):
    """Changes what the file says, where it says it."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        mutate_json(content, chance)
        path.write_text(json.dumps(content))
    elif path.read_bytes()[8:9] == b"{" and chance.random() < 0.7:
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        mutate_json(header, chance)
        encoded = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + size :])
    else:
        is_mapped = path.read_bytes()[8:9] == b"{"
        content = load_file(path) if is_mapped else torch.load(path, weights_only=False)
        mutate_state(content.get("model", content), chance)
        path.unlink()  # the mapped file, which may not change
        torch.save(content, path, _use_new_zipfile_serialization=chance.random() < 0.7)


def use_adapter(path):
    format, checkpoint = identify(path, Told(layout="blocked"))
    assert all(line.isprintable() for line in describe(format, checkpoint).split("\n"))
    for target in WRITABLE:
        try:
            save_adapter(path.parent / "out", checkpoint, target, allow_loss=True)
        except CheckpointError as error:
            assert str(error).isprintable()
        except FileExistsError:  # a folder where another format wrote a file
            (path.parent / "out").unlink()
    load_for_model(path, CONFIG)


def trainer(path):
    path.mkdir()
    sharded(path, model_state())
    return path


def zinit(path):
    save_adapter(path, ours())
    return path


def meta(path):
    meta_directory(path, hf_model("llama"), num_shards=2)
    return path


def hf(path):
    hf_directory(path, "llama3", shard_size="60KB")
    return path


KINDS = {
    "zinit": (zinit, use_adapter),
    "trainer": (trainer, use_adapter),
    "hf": (hf, load_base),
    "meta": (meta, load_base),
} | {
    name: (lambda path, name=name: put(path, name), use_adapter)
    for name in ("official-v1", "official-v2-lora", "peft", "litgpt-v2")
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files(tmp_path, kind):
    make, use = KINDS[kind]
    source = make(tmp_path / "source")
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    content, outcomes = {path: path.read_bytes() for path in files}, set()
    for seed in range(30):
        chance = random.Random(seed)
        for path in files:
            path.unlink(missing_ok=True)
            path.write_bytes(content[path])
        path = chance.choice(files)
        mutate(path, chance)
        try:
            use(source)
            outcomes.add("read")
        except (CheckpointError, UserError) as error:
            assert str(error).isprintable() and len(str(error)) < 1500
            outcomes.add("refused")
    assert "refused" in outcomes
