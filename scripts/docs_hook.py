"""mkdocs hook: README.md, DESIGN.md, CONTRIBUTING.md and others outside docs/ become pages of the site.

On GitHub they link to docs/page.md and to files of the checkout. On the site the first are page.md, and the second, for
which the site has no page, are shown as names.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "csrc/cuda/README.md": "cuda.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def rewritten(text: str, source: str = "") -> str:
    """`text` of the root folder's `source` with its links as the site has them."""

    def link(match: re.Match[str]) -> str:
        picture, shown, target, anchor = match[1], match[2], match[3], match[4] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        if not (ROOT / target).exists():
            raise ValueError(f"{source} links to {target}, which is not there")
        if target in PAGES:
            return f"[{shown}]({PAGES[target]}{anchor})"
        if target.startswith("docs/"):
            return f"{picture}[{shown}]({target.removeprefix('docs/')}{anchor})"
        return shown if shown.startswith("`") else f"`{shown}`"

    return LINK.sub(link, text)


def on_files(files, config):
    for source, page in PAGES.items():
        if (ROOT / source).is_file():
            content = rewritten((ROOT / source).read_text(), source)
            files.append(File.generated(config, page, content=content))
    return files
