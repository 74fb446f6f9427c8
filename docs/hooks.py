"""What MkDocs does with links that lead out of docs/: the site has the pages alone, a checkout everything.

The overview is the README, and a link to that leads there. A link to another file that is no page becomes its text.
"""

import logging
import os
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")  # neither pictures nor addresses

_logger = logging.getLogger("mkdocs.hooks.links")  # --strict counts warnings below "mkdocs"


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Return a page's text with its links as they are in the site."""
    folder = ROOT / "docs"
    if page.file.src_uri == "index.md":
        markdown, folder = (ROOT / "README.md").read_text(), ROOT
        markdown = re.sub(r"(!\[[^\]]*\]\()docs/", r"\1", markdown)

    def change(match: re.Match) -> str:
        text, target, anchor = match.groups(default="")
        path = Path(os.path.normpath(folder / target))
        if path == ROOT / "README.md":
            return f"[{text}](index.md{anchor})"
        if path.is_relative_to(ROOT / "docs"):
            return f"[{text}]({path.relative_to(ROOT / 'docs')}{anchor})"
        if not path.exists():
            _logger.warning(f"{page.file.src_uri} names {target}, which is not there")
        return text if "`" in text else f"`{text}`" if "/" in text or "." in text else text

    return LINK.sub(change, markdown)
