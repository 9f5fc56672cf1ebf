"""Programs that tests start import the versions that the test session itself imports."""

import re

from repository import ROOT, search_path

# the argument behind the name, in a dictionary or as a keyword
GIVEN = re.compile(r"""["']?PYTHONPATH["']?\s*(?::|=)\s*(\w+)""")


def test_no_program_is_started_with_another_search_path(monkeypatch):
    """`make test-oldest` and `make test-transformers` say by PYTHONPATH what is tested."""
    lost = []
    for path in sorted(ROOT.glob("tests/**/*.py")):
        for match in GIVEN.finditer(path.read_text(encoding="utf-8")):
            if match[1] not in ("search_path", "path", "paths") and path.name != "test_search_path.py":
                lost.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not lost, lost
    monkeypatch.setenv("PYTHONPATH", "/older/versions")
    assert search_path("/a", "/b").split(":") == ["/a", "/b", "/older/versions"]
    monkeypatch.delenv("PYTHONPATH")
    assert search_path("/a") == "/a"
