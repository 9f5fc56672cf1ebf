"""Ledgers -> docs/benchmarks.md, its pictures, and the README's table. `python -m bench report`"""

from __future__ import annotations

from pathlib import Path

from .chapters import chapters
from .page import goals_of, page
from .plots import draw
from .summary import readme_table

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin: python -m bench report -->", "<!-- end -->"


def with_table(readme: str, table: str) -> str:
    """The README with what stands between the two marks replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md must hold {BEGIN!r} and, after it, {END!r}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def write(results: Path, root: Path = ROOT) -> list[Path]:
    """Everything that is generated from the ledgers; the files written."""
    docs = root / "docs"
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    pictures = {
        folder: draw([m.row for m in rows], docs / "figures", folder)
        for folder, rows in chapters(results).items()
    }
    files = {docs / "benchmarks.md": page(results, pictures)}
    readme = root / "README.md"
    if readme.exists():
        files[readme] = with_table(readme.read_text(), readme_table(results, goals_of))
    for path, text in files.items():
        path.write_text(text)
    return [*files, *(docs / "figures" / name for names in pictures.values() for name in names)]
