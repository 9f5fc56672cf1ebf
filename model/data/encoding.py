"""Records to token samples: Alpaca's template, or the chat template of the tokenizer.

encoder = Encoder(tokenizer, max_seq_len=512)
samples = [sample for record in records if (sample := encoder(record)) is not None]
print(encoder.report)
"""

from __future__ import annotations

from collections.abc import Iterable

from ..chat import SpecialTokenInText, encode_answers
from ..errors import UserError
from ..records import Record
from ..tokenizer import Tokenizer
from .messages import Conversation, Message
from .samples import EncodingReport, Sample

TEMPLATES = ("auto", "alpaca", "chat")


class Encoder:
    """Makes a sample of a record, and counts what it cuts or leaves out.

    template: "alpaca" = the template of Stanford Alpaca, for records and for conversations of one question and one
    answer; "chat" = the tokenizer's own, for both; "auto" = Alpaca's for records and the tokenizer's for conversations.
    A sample of more than max_seq_len tokens loses its end, as in the official script.
    """

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int, template: str = "auto"):
        self.tokenizer, self.max_seq_len, self.template = tokenizer, max_seq_len, template
        self.truncated = self.dropped = self.untold = self.special = 0
        self.unended = 0  # conversations in which no special token ends an answer

    @property
    def report(self) -> EncodingReport:
        """What became of the records until now."""
        return EncodingReport(self.max_seq_len, self.truncated, self.dropped, self.untold, self.special)

    def __call__(self, record: Record | Conversation) -> Sample | None:
        """The sample of a record; None if it is left out. Only the beginning of a long Alpaca record is encoded, so
        one of 10 MB costs no more than one of 10 kB.
        """
        if isinstance(record, Conversation) and self.template == "alpaca":
            record = _as_record(record)
        elif isinstance(record, Record) and self.template == "chat":
            record = _as_conversation(record)
        return self._record(record) if isinstance(record, Record) else self._conversation(record)

    def _record(self, record: Record) -> Sample | None:
        limit = self.max_seq_len + 1  # one more tells whether anything is cut
        prompt = self.tokenizer.encode(record.prompt, eos=False, limit=limit)
        tokens = self.tokenizer.encode(record.prompt + record.output, eos=True, limit=limit)
        # A tokenizer may merge across the border; the answer begins where the two sequences part.
        pairs = enumerate(zip(prompt, tokens, strict=False))
        prompt_length = next((index for index, (ours, whole) in pairs if ours != whole), len(prompt))
        prompt_length = max(prompt_length, 1)  # nothing predicts the first token
        if prompt_length >= self.max_seq_len:
            self.dropped += 1
            return None
        if prompt_length >= len(tokens):
            # the tokenizer has no end-of-sequence token, and none for the answer's characters
            self.untold += 1
            return None
        self.truncated += len(tokens) > self.max_seq_len
        return Sample(tokens[: self.max_seq_len], prompt_length, record.images)

    def _conversation(self, record: Conversation) -> Sample | None:
        messages = [{"role": message.role, "content": message.content} for message in record.messages]
        try:
            ids, answers, ended = encode_answers(self.tokenizer, messages, self.max_seq_len + 1)
        except SpecialTokenInText:
            self.special += 1
            return None
        except UserError as error:
            raise UserError(f"{record.where}: {error}" if record.where else str(error)) from None
        self.unended += not ended
        said = [message for message in record.messages if message.role == "assistant"]
        wanted = [span for message, span in zip(said, answers, strict=True) if message.learned]
        wanted = [(start, end) for start, end in wanted if start < end]
        kept = [(start, min(end, self.max_seq_len)) for start, end in wanted if start < self.max_seq_len]
        if not wanted:
            self.untold += 1
            return None
        if not kept:
            self.dropped += 1
            return None
        self.truncated += kept[-1][1] < wanted[-1][1]
        # behind the last answer nothing is learned
        return Sample(ids[: kept[-1][1]], kept[0][0], (), tuple(kept))


def encode(
    records: Iterable[Record | Conversation], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[Sample], EncodingReport]:
    """Samples of at most max_seq_len tokens. A longer one loses its end. One whose prompt leaves no room for an answer
    is left out. The report counts both.
    """
    encoder = Encoder(tokenizer, max_seq_len)
    samples = [sample for record in records if (sample := encoder(record)) is not None]
    return samples, encoder.report


def _as_record(conversation: Conversation) -> Record:
    """A conversation of one question and one answer as an Alpaca record."""
    roles = [message.role for message in conversation.messages]
    if roles != ["user", "assistant"]:
        raise UserError(
            f"{conversation.where}: a conversation of {', '.join(roles)} has no place in Alpaca's template, which has "
            "one instruction and one answer: take --template chat."
        )
    return Record(*(message.content for message in conversation.messages))


def _as_conversation(record: Record) -> Conversation:
    """An Alpaca record as a question and an answer; the input stands below the instruction."""
    question = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    return Conversation((Message("user", question), Message("assistant", record.output)))
