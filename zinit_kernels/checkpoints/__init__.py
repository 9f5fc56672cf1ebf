"""Adapters on disk: one neutral form in memory, and a table of the file formats that hold it.

    zinit        our own: safetensors
    official-v1  LLaMA-Adapter V1 (arXiv 2303.16199), extracted or the whole training file
    official-v2  LLaMA-Adapter V2 multimodal (arXiv 2304.15010): its prompts and gates, the rest kept beside them
    peft         PEFT's AdaptionPromptConfig: a folder of adapter_model.safetensors and adapter_config.json
    litgpt       litgpt's adapter and adapter_v2

Keys are strict, and a gate's activation is a stored fact wherever the format has room for it, never a guess of the
reader's. `python -m zinit_kernels.convert` and `python -m zinit_kernels.inspect` are the same from a shell.
"""

from .adapter import AdapterCheckpoint, CheckpointError
from .files import write_atomically
from .formats import FORMATS, load_adapter, save_adapter

__all__ = [
    "FORMATS",
    "AdapterCheckpoint",
    "CheckpointError",
    "load_adapter",
    "save_adapter",
    "write_atomically",
]
