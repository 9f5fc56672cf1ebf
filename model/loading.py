"""Base models from disk and back.

Files are memory-mapped, and tensors become parameters without a copy wherever the file has them in the wanted dtype
and order: the model is built on the meta device and the loaded tensors are assigned. Names are checked strictly. Each
format is a module with a function `read`, which takes a path and the wanted dtype, and returns the configuration and
the weights under our names. A format that computes its weights makes them of the wanted dtype at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zinit_kernels.checkpoints import CheckpointError, write_together
from zinit_kernels.checkpoints.adapter import some
from zinit_kernels.packed import PackedWeight

from . import gguf_weights, hf_weights, meta_weights
from .config import LlamaConfig
from .errors import UserError, is_out_of_memory
from .llama import Llama
from .quantised import PACKED, is_quantised, put_packed
from .quantised import quantise as quantise_base

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Read = Callable[[Path, torch.dtype | None], tuple[LlamaConfig, dict[str, Tensor]]]
# The file that tells a format -> how such a folder is read
_PACKED = {hf_weights.read: hf_weights.read_packed, gguf_weights.read: gguf_weights.read_packed}
_FORMATS = {"config.json": hf_weights.read, "params.json": meta_weights.read, "*.gguf": gguf_weights.read}
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")  # of the first two


def default_device() -> str:
    """What --device is unless told: CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(name: str) -> torch.device:
    """The device of this name. Raises UserError if torch has none, or one whose tensors have no values."""
    try:
        torch.ones(1, device=name).cpu()  # fails on meta, where tensors have no values
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it was built without
        if is_out_of_memory(error):
            raise
        # only the first sentence: the next one is about torch's internals
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"--device {name}: {reason}.") from error
    return torch.device(name)


def load_base(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantise: str | None = None,
) -> Llama:
    """The model of a checkpoint folder, Hugging Face's or Meta's, or of a GGUF file or a folder with one.

    dtype None = the file's; for quantised weights float32 with a GGUF file, the embedding's with other files.

    quantise: one of `quantised.FORMATS`. The layers are quantised one after the other. With int8 and int4, matrices
    that the files hold in 8 or 4 bits stay as they are, whichever of the two is asked for: GGUF's blocks of Q8_0, Q4_0
    and Q4_1, and what `hf_quantised` reads. The rest of a GGUF model is then bfloat16 unless dtype says otherwise.

    On the CPU and in the file's dtype the weights stay memory-mapped: they are read as they are used, and the page
    cache may drop them again. Raises UserError; OSError if a file cannot be read.
    """
    directory = Path(directory)
    if not directory.exists() or (not directory.is_dir() and directory.suffix.lower() != ".gguf"):
        raise UserError(
            f"{directory} is not a directory: --base takes the folder of a checkpoint, or a GGUF file."
        )
    try:
        return _load(directory, dtype, device, quantise)
    except CheckpointError as error:
        raise UserError(f"{error}.") from error


def _load(
    directory: Path, dtype: torch.dtype | None, device: torch.device | str, quantise: str | None
) -> Llama:
    read = _reader(directory)
    packed: dict[str, PackedWeight] = {}
    if quantise in PACKED and read in _PACKED:
        config, weights, packed = _PACKED[read](directory)
        if read is gguf_weights.read:
            dtype = dtype or torch.bfloat16
    else:
        config, weights = read(directory, dtype)
    present = {name.split(".")[1] for name in (*weights, *packed) if name.startswith("layers.")}
    if config.num_layers > len(present):  # before as many are built
        raise UserError(
            f"{directory} holds {len(present)} layers, the configuration says {config.num_layers}."
        )
    with torch.device("meta"), _NoInit():
        model = Llama(config)
    stand_ins = {name: torch.empty(w.rows, w.columns, device="meta") for name, w in packed.items()}
    _check_keys(model.state_dict(), {**weights, **stand_ins}, directory)
    dtype = dtype or hf_weights.embedding_dtype(weights)
    put_packed(model, packed, dtype)
    state = {}
    for name, weight in list(weights.items()):
        state[name] = weight.to(device=device, dtype=dtype)
        del weights[name]
    for name, weight in packed.items():
        state[name] = weight.data.to(device)
    model.load_state_dict(state, assign=True)
    return quantise_base(model, quantise)


def _reader(path: Path) -> Read:
    if path.is_file():
        return gguf_weights.read
    found = [read for pattern, read in _FORMATS.items() if any(path.glob(pattern))]
    if not found:
        raise UserError(
            f"{path} has neither config.json (Hugging Face) nor params.json (Meta), nor a GGUF file."
        )
    # GGUF files often lie beside the config.json of the model that they were made of
    return found[0] if any(any(path.glob(pattern)) for pattern in _WEIGHTS) else found[-1]


def save_base(model: Llama, directory: str | Path) -> None:
    """Writes config.json and model.safetensors, as `load_base` and transformers read them. Raises UserError for a
    quantised model: no Hugging Face folder holds its weights."""
    if is_quantised(model):
        raise UserError(f"{directory}: a quantised base is not written; quantise it when it is loaded.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name if name == "lm_head.weight" else f"model.{name}": t for name, t in model.state_dict().items()
    }
    weights = to_safetensors({name: t.contiguous() for name, t in state.items()}, {"format": "pt"})
    config = model.config.to_hf() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    content = (json.dumps(config, indent=2) + "\n").encode()
    write_together({directory / "model.safetensors": weights, directory / "config.json": content})


class _NoInit(TorchFunctionMode):
    """Leaves parameters as they are: initialising them on the meta device would import sympy, 2 to 5 s for
    nothing.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], directory: Path) -> None:
    if missing := expected.keys() - found.keys():
        raise UserError(f"{directory} lacks {some(missing)}.")
    if unknown := found.keys() - expected.keys():
        raise UserError(f"{directory} holds {some(unknown)}, which a LLaMA does not have.")
    for name, weight in found.items():
        if weight.shape != expected[name].shape:
            raise UserError(
                f"{directory}: {name} must have shape {tuple(expected[name].shape)} by the configuration, "
                f"the file has {tuple(weight.shape)}."
            )
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UserError(f"{directory}: {name} is {weight.dtype}, quantised weights are not supported.")
