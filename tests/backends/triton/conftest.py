import contextlib

with contextlib.suppress(ImportError):  # without Triton the tests that take it are skipped
    from noted_launches import launches  # noqa: F401 (fixture)
