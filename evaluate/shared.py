"""What the commands share with `zinit train` and `zinit generate`, by whichever name that package has here.

In a checkout the folder model/ is the package `model`; installed, it is `zinit_kernels.model`, beside
`zinit_kernels.evaluate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__ == "evaluate":
    from model.adapter import LlamaAdapter
    from model.errors import UserError, is_out_of_memory, note, run_program, warn
    from model.llama import Llama, about_images
    from model.loading import DTYPES, default_device, load_base, open_device
    from model.program import interruptible, program
    from model.progress import Show, messages, progress
    from model.records import format_prompt, json_values, read_records, read_text
    from model.run_folder import (
        append,
        held,
        make_directory,
        refuse_unwritable,
        remove_leftovers,
        write_file,
        writing,
    )
    from model.sampling import generate
    from model.tokenizer import Tokenizer, load_tokenizer
    from model.vision.adapter import VisualAdapter
    from model.vision.files import open_adapter
    from model.vision.options import open_source
else:
    from ..model.adapter import LlamaAdapter
    from ..model.errors import UserError, is_out_of_memory, note, run_program, warn
    from ..model.llama import Llama, about_images
    from ..model.loading import DTYPES, default_device, load_base, open_device
    from ..model.program import interruptible, program
    from ..model.progress import Show, messages, progress
    from ..model.records import format_prompt, json_values, read_records, read_text
    from ..model.run_folder import (
        append,
        held,
        make_directory,
        refuse_unwritable,
        remove_leftovers,
        write_file,
        writing,
    )
    from ..model.sampling import generate
    from ..model.tokenizer import Tokenizer, load_tokenizer
    from ..model.vision.adapter import VisualAdapter
    from ..model.vision.files import open_adapter
    from ..model.vision.options import open_source

__all__ = [
    "DTYPES", "Llama", "LlamaAdapter", "Show", "Tokenizer", "UserError", "VisualAdapter", "about_images", "append",
    "command_name", "default_device", "format_prompt", "generate", "held", "interruptible", "is_out_of_memory",
    "json_values", "load_base", "load_tokenizer", "make_directory", "messages", "note",
    "open_adapter", "open_device", "open_source", "program", "progress", "read_records", "read_text",
    "refuse_unwritable", "remove_leftovers", "run_program", "warn", "write_file", "writing",
]  # fmt: skip


def command_name(name: str = "") -> str:
    """How the user calls a command: `zinit evaluate mme` where it is installed, else python -m evaluate mme."""
    return f"{'python -m' if __package__ == 'evaluate' else 'zinit'} evaluate {name}".rstrip()
