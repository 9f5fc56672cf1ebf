"""Base weights from disk: Hugging Face directories (safetensors) and Meta's (consolidated.*.pth).

Files are memory-mapped and tensors become parameters without a copy wherever the file has them in the wanted
dtype and convention: the model is built on the meta device and the loaded tensors are assigned. Keys are
strict.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zinit_kernels.checkpoints import write_atomically

from .config import LlamaConfig
from .errors import UserError
from .llama import Llama

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Meta's name -> ours, and the dimension its shards are cut along (None: every shard holds the whole)
_META_NAMES = {
    "tok_embeddings.weight": ("embed_tokens.weight", 1),  # LLaMA 3 cuts dimension 0: told from the shape
    "norm.weight": ("norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
}
_META_LAYER_NAMES = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
_DERIVED = re.compile(r"(^|\.)(rope\.freqs|rotary_emb\.inv_freq)$")  # tables some files carry, computed here


def default_device() -> str:
    """What --device is unless told: CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(name: str) -> torch.device:
    """The device of this name. Raises UserError if torch knows none, or holds no values there."""
    try:
        torch.ones(1, device=name).cpu()  # fails on meta, which makes tensors but holds nothing
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it was built without
        # the next sentence tells of torch's insides
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"--device {name}: {reason}.") from error
    return torch.device(name)


def load_base(
    directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Llama:
    """The model of a checkpoint directory. dtype None = the file's.

    On the CPU in the file's dtype the weights stay memory-mapped: they are read as they are used and the page
    cache may drop them again.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: --base takes the folder of a checkpoint.")
    if (directory / "config.json").is_file():
        config, weights = _read_hf(directory)
    elif (directory / "params.json").is_file():
        config, weights = _read_meta(directory)
    else:
        raise UserError(f"{directory} has neither config.json (Hugging Face) nor params.json (Meta).")
    present = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if config.num_layers > len(present):  # before as many are built
        raise UserError(
            f"{directory} holds {len(present)} layers, the configuration says {config.num_layers}."
        )
    with torch.device("meta"), _NoInit():
        model = Llama(config)
    _check_keys(model.state_dict(), weights, directory)
    dtype = dtype or weights["embed_tokens.weight"].dtype
    state = {}
    for name, weight in list(weights.items()):
        state[name] = weight.to(device=device, dtype=dtype)
        del weights[name]
    model.load_state_dict(state, assign=True)
    return model


def save_base(model: Llama, directory: str | Path) -> None:
    """Writes config.json and model.safetensors, as `load_base` and transformers read them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name if name == "lm_head.weight" else f"model.{name}": t for name, t in model.state_dict().items()
    }
    weights = to_safetensors({name: t.contiguous() for name, t in state.items()}, {"format": "pt"})
    write_atomically(directory / "model.safetensors", weights)
    config = model.config.to_hf() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    write_atomically(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())


class _NoInit(TorchFunctionMode):
    """Leaves parameters as they are: initialising them on the meta device would import sympy, 2 to 5 s for
    nothing.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _read_hf(directory: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    raw = _read_json(directory / "config.json")
    if "quantization_config" in raw:
        raise UserError(
            f"{directory} holds quantised weights, load a float32, bfloat16 or float16 checkpoint."
        )
    generation = directory / "generation_config.json"
    config = LlamaConfig.from_hf(raw, _read_json(generation) if generation.is_file() else None)
    weights: dict[str, Tensor] = {}
    for shard, names in _hf_shards(directory).items():
        try:
            with safe_open(shard, framework="pt") as file:
                present = set(file.keys())
                if names is not None and names - present:
                    raise UserError(f"{shard} lacks {_some(names - present)}, which the index places there.")
                for name in present if names is None else names:
                    weights[name.removeprefix("model.")] = file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{shard} is truncated or not a safetensors file: {error}.") from error
    weights = {name: weight for name, weight in weights.items() if not _DERIVED.search(name)}
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return config, weights


def _hf_shards(directory: Path) -> dict[Path, set[str] | None]:
    """shard -> the names to take from it, None = all."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        shards: dict[Path, set[str] | None] = {}
        places = _read_json(index).get("weight_map")
        if (
            not places
            or not isinstance(places, dict)
            or not all(isinstance(file, str) for file in places.values())
        ):
            raise UserError(f"{index} must name the file of each tensor in an object weight_map.")
        for name, file in places.items():
            names = shards.setdefault(directory / file, set())
            assert names is not None
            names.add(name)
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise UserError(
                f"{directory} lacks {_some(missing)} of the {len(shards)} shards its index names."
            )
        return shards
    if single.is_file():
        return {single: None}
    raise UserError(
        f"{directory} has neither model.safetensors nor model.safetensors.index.json; convert other "
        "formats with transformers' save_pretrained."
    )


def _read_meta(directory: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    params = _read_json(directory / "params.json")
    shards = [_read_pickle(path) for path in _meta_shards(directory)]
    names = shards[0].keys()
    for index, shard in enumerate(shards):
        if shard.keys() != names:
            raise UserError(
                f"{directory}: shard {index} holds other tensors than shard 0: {_some(shard.keys() ^ names)}."
            )
    if "tok_embeddings.weight" not in names:
        raise UserError(
            f"{directory}: the shards hold no tok_embeddings.weight, so this is no LLaMA checkpoint."
        )
    for name in names:
        shapes = {tuple(shard[name].shape) for shard in shards}
        if _meta_name(name)[1] is not None and (len(shapes) > 1 or len(min(shapes)) != 2 or 0 in min(shapes)):
            raise UserError(
                f"{directory}: {name} must be a matrix of one shape in all shards, it has {shapes}."
            )
    query, rows = shards[0].get("layers.0.attention.wq.weight"), params.get("dim")
    if query is not None and isinstance(rows, int) and query.shape[0] * len(shards) != rows:
        raise UserError(f"{directory} holds {len(shards)} of {rows // query.shape[0]} shards.")
    vocab_dim = 0 if shards[0]["tok_embeddings.weight"].shape[1] == params.get("dim") else 1
    vocab_size = shards[0]["tok_embeddings.weight"].shape[0] * (len(shards) if vocab_dim == 0 else 1)
    config = LlamaConfig.from_meta(params, vocab_size, tie_embeddings="output.weight" not in names)
    weights = {}
    for name in names:
        if _DERIVED.search(name):
            continue
        ours, dim = _meta_name(name)
        parts = [shard[name] for shard in shards]
        if name == "tok_embeddings.weight":
            dim = vocab_dim
        weight = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            if weight.shape[0] % config.head_dim:
                raise UserError(
                    f"{directory}: {name} has {weight.shape[0]} rows, no multiple of head_dim {config.head_dim}."
                )
            weight = _to_half_split(weight, config.head_dim)
        weights[ours] = weight
    return config, weights


def _meta_shards(directory: Path) -> list[Path]:
    shards = sorted(directory.glob("consolidated.*.pth"))
    expected = [f"consolidated.{index:02d}.pth" for index in range(len(shards))]
    if not shards or [shard.name for shard in shards] != expected:
        found = ", ".join(shard.name for shard in shards) or "none"
        raise UserError(
            f"{directory} must hold consolidated.00.pth and the shards that follow it, found {found}."
        )
    return shards


def _read_pickle(path: Path) -> Mapping[str, Tensor]:
    path.open("rb").close()  # a file that may not be read is an OSError that names it
    try:
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, so it was not loaded.") from error
    except Exception as error:  # in a damaged pickle whatever the next instruction stumbles over
        raise UserError(f"{path} is truncated or not a checkpoint of torch.save.") from error
    if not isinstance(shard, dict) or not all(isinstance(weight, Tensor) for weight in shard.values()):
        raise UserError(f"{path} does not hold a dictionary of tensors.")
    return shard


def _meta_name(name: str) -> tuple[str, int | None]:
    """Ours and the sharded dimension; a name that is not LLaMA's stays as it is: the key check reports it."""
    if match := re.fullmatch(r"(layers\.\d+)\.(.+)", name):
        ours, dim = _META_LAYER_NAMES.get(match[2], (match[2], None))
        return f"{match[1]}.{ours}", dim
    return _META_NAMES.get(name, (name, None))


def _to_half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k from Meta's interleaved rotary pairs (0, 1), (2, 3), ... to pairs (i, i + D/2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], directory: Path) -> None:
    if missing := expected.keys() - found.keys():
        raise UserError(f"{directory} lacks {_some(missing)}.")
    if unknown := found.keys() - expected.keys():
        raise UserError(f"{directory} holds {_some(unknown)}, which a LLaMA does not have.")
    for name, weight in found.items():
        if weight.shape != expected[name].shape:
            raise UserError(
                f"{directory}: {name} must have shape {tuple(expected[name].shape)} by the configuration, "
                f"the file has {tuple(weight.shape)}."
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UserError(f"{directory}: {name} is {weight.dtype}, quantised weights are not supported.")


def _some(names: Iterable[str]) -> str:
    """The first three of some names, and how many more."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return content
