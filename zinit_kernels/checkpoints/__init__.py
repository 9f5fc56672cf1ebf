"""Adapters on disk: one form in memory, and a table of the file formats that hold it.

    zinit        our own: safetensors
    official-v1  LLaMA-Adapter V1 (arXiv 2303.16199), extracted or the whole training file
    official-v2  LLaMA-Adapter V2 multimodal (arXiv 2304.15010): prompts and gates; its other tensors are kept
    peft         PEFT's AdaptionPromptConfig: a folder of adapter_model.safetensors and adapter_config.json
    litgpt       litgpt's adapter and adapter_v2, lit-llama's adapter
    trainer      a model saved with its prompts in it, e.g. by transformers' Trainer: read, never written

Names of tensors are checked strictly. Files come from anywhere, so their tensors, JSON and names pass one door each
(`tensor_files`, `json_files`, `zinit_kernels.console`). From a shell: `python -m zinit_kernels.convert` and `.inspect`.
"""

from .adapter import AdapterCheckpoint, CheckpointError
from .formats import FORMATS, WRITABLE, files_of, load_adapter, save_adapter, saved_stacks
from .writing import write_atomically, write_together

__all__ = [
    "FORMATS",
    "WRITABLE",
    "AdapterCheckpoint",
    "CheckpointError",
    "files_of",
    "load_adapter",
    "save_adapter",
    "saved_stacks",
    "write_atomically",
    "write_together",
]
