"""A service of a tiny base with unlike adapters, over HTTP in this process."""

import openai
import pytest
from tiny_serving import Listening, make_service


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The service and its adapters by name."""
    return make_service(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(made):
    return made[1]


@pytest.fixture(scope="module")
def server(made):
    with Listening(made[0], admin_token="token", load=lambda path: made[1][path]) as listening:
        yield listening


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one
