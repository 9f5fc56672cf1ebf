"""Poison for every test: outputs that a kernel forgets to write hold NaN, not last call's right answer."""

import os
import signal

os.environ["ZINIT_POISON_OUTPUTS"] = "1"  # read once by the kernels' library: its allocations start as NaN

import limits  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from zinit_kernels.backends import extension  # noqa: E402

limits.install()


@pytest.fixture(autouse=True)
def nan_filled_allocations():
    """torch.empty comes filled with NaN (integers: their maximum)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base and its data, for the programs; read by every test and written by none."""
    from tiny_runs import make_folder  # the programs' libraries, which few tests need

    return make_folder(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory):
    """The output of an uninterrupted training run on `folder`; written by none."""
    from tiny_runs import arguments, run

    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(*arguments(folder, output)) == 0
    return output


def pytest_configure(config):
    # a shell starts what runs in its background with SIGINT ignored, and the programs leave it so
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "native: needs the compiled CPU kernels")
    config.addinivalue_line(
        "markers", "interpreted: runs under Triton's interpreter, in a process of its own"
    )


def pytest_collection_modifyitems(items):
    """Tests of the native kernels are skipped where none were built, unless ZINIT_REQUIRE_NATIVE=1 (make test)."""
    reason = extension.why_unavailable("cpu")
    if not reason or os.environ.get("ZINIT_REQUIRE_NATIVE") == "1":
        return
    for item in items:
        if "native" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))
