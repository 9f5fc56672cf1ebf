"""The emulator's tests run on one thread, and share the emulated kernels with the tests of all backends."""

import pytest
from emulated import cuda, emulator, register  # noqa: F401 (fixtures)
from threads import one_thread


@pytest.fixture(autouse=True, scope="session")
def on_one_thread():
    with one_thread():
        yield
