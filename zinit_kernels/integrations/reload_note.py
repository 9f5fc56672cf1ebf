"""A sentence for transformers' warning that it left prompts out of a model it has loaded.

A folder in which `save_pretrained` or Trainer wrote a model with prompts holds them too. `from_pretrained` builds the
model by its configuration, which has no place for them. It gives the base, and warns of unexpected keys, which "can be
ignored".
"""

from __future__ import annotations

import logging

NOTE = (
    "The keys with .zinit. in them are zero-init prompts, and the loaded model is the base without them: "
    "load_adapter(model, folder) of zinit_kernels.integrations.transformers reads them from the same folder."
)
_WARNINGS = ("UNEXPECTED", "were not used when initializing")  # of transformers 5, and of 4


def _add_note(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if ".zinit." in message and NOTE not in message and any(words in message for words in _WARNINGS):
        record.msg, record.args = f"{message}\n\n{NOTE}", ()
    return True


logging.getLogger("transformers.modeling_utils").addFilter(_add_note)
