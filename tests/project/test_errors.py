"""Every exception of the project reaches another process: a pool that cannot read one waits for ever."""

import inspect
import pickle

import pytest

import bench.ledger  # noqa: F401  # each module that defines an exception
import evaluate.question
import model.chat
import model.serving.errors
import model.serving.request
import model.vision.images
import zinit_kernels.checkpoints  # noqa: F401
from zinit_kernels.console import InputError

VALUES = {"sentence": "a sentence", "message": "a sentence", "answers": {"1": "yes"}, "status": 429}
VALUES |= {"code": "c", "param": "p", "retry_after": 3}


def below(kind):
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


KINDS = [InputError, *below(InputError), model.serving.errors.ApiError]


def test_the_list_is_not_empty():
    assert {evaluate.question.PartlyAnswered, model.chat.SpecialTokenInText} <= set(KINDS)
    assert {model.vision.images.ImageError, model.serving.request.QueueFull} <= set(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_exception_is_sent_whole(kind):
    parameters = inspect.signature(kind).parameters.values()
    by_name = {p.name: VALUES[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    error = kind(*(VALUES[p.name] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD), **by_name)
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is kind and str(sent) == str(error) and vars(sent) == vars(error)
