"""mypy over the Python examples of README.md and docs/: users with a type checker copy them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "doc-examples"


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("*.py"):
        old.unlink()
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        for number, code in enumerate(blocks, 1):
            (OUT / f"{page.stem.replace('-', '_')}_{number}.py").write_text(code)
    return subprocess.call([sys.executable, "-m", "mypy", *map(str, sorted(OUT.glob("*.py")))], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
