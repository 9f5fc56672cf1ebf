"""The launch of a compiled kernel: what reaches Triton's launcher is what Triton itself would hand to it."""

from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402

from zinit_kernels.backends.triton import launcher  # noqa: E402


@pytest.fixture
def compiled():
    """A compiled kernel whose launcher notes its arguments."""
    run = object.__new__(CudaLauncher)
    run.noted, run.num_ctas = [], 1
    run.launch = lambda *given: run.noted.append(given)
    run.global_scratch_size = run.profile_scratch_size = 0
    run.global_scratch_align = run.profile_scratch_align = 1
    run.launch_cooperative_grid, run.launch_pdl, run.gsan_enabled = False, True, False
    run.arg_annotations, run.kernel_signature = ["annotations"], b"signature"
    return SimpleNamespace(run=run, function=1234, packed_metadata=(4, 1, 65536))


def launched(compiled, arguments):
    names = {"a": [7, 9]}
    exec(f"def f(stream): {launcher.call_of(compiled, 12, arguments, names, 'k0_')}", names)
    names["f"](5)


@pytest.mark.skipif(not launcher.IS_KNOWN, reason="the launcher of this Triton was not looked at")
def test_the_launcher_gets_what_triton_gives_it(compiled):
    run = compiled.run
    run(12, 1, 1, 5, 1234, (4, 1, 65536), None, None, None, 7, (9, 3, 3), 0.5, None)
    launched(compiled, "a[0], (a[1], 3, 3,), 0.5, None")
    assert len(run.noted) == 2 and run.noted[0] == run.noted[1]


@pytest.mark.parametrize("reason", ["scratch", "profile", "version", "other launcher"])
def test_what_is_not_known_goes_through_triton(reason, compiled, monkeypatch):
    """Scratch memory is allocated by Triton, and nobody has looked at the launchers of other versions."""
    called = []
    monkeypatch.setattr(CudaLauncher, "__call__", lambda self, *given: called.append(given))
    if reason == "scratch":
        compiled.run.global_scratch_size = 128
    elif reason == "profile":
        compiled.run.profile_scratch_size = 128
    elif reason == "version":
        monkeypatch.setattr(launcher, "IS_KNOWN", False)
    else:
        compiled.run = lambda *given: called.append(given)
    launched(compiled, "a[0], a[1]")
    assert called == [(12, 1, 1, 5, 1234, (4, 1, 65536), None, None, None, 7, 9)]
