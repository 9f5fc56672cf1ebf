"""Instruction data: files to records, records to token samples, and samples to batches, packed or padded.

    records = read_records("alpaca.json")
    samples, report = encode(records, tokenizer, max_seq_len=512)
    for batch in batches(samples, max_tokens=4096): ...

A sample of an Alpaca record is the template filled with the instruction, the answer and the end-of-sequence token,
after the tokens that the tokenizer puts before every text (LLaMA's: beginning of sequence). A sample of a conversation
is the tokenizer's chat template, filled. The loss is taken on the answers, and on the token that ends each of them,
alone.
"""

from ..records import Record, format_prompt, read_records
from .encoding import Encoder, encode
from .messages import Conversation, Message
from .samples import (
    Batch,
    EncodingReport,
    Sample,
    batches,
    count_answer_tokens,
    epoch_order,
    pack,
    pad,
    passes,
    split,
)

__all__ = [
    "Batch",
    "Conversation",
    "Encoder",
    "EncodingReport",
    "Message",
    "Record",
    "Sample",
    "batches",
    "count_answer_tokens",
    "encode",
    "epoch_order",
    "format_prompt",
    "pack",
    "pad",
    "passes",
    "read_records",
    "split",
]
