"""What the site needs besides the pages in docs/.

Markdown files of other folders become pages of it, and links to files outside docs/
become plain text. In the repository, where the pages are read too, such links work as
they are.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository to the page that it becomes."""

_LINK = re.compile(
    r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)]*)?\)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of `ELSEWHERE`."""
    for source, page in ELSEWHERE.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Turns links that leave docs/ into links within the site, or into text."""
    origins = {made: source for source, made in ELSEWHERE.items()}
    origin = origins.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = (ROOT / origin).parent
    depth = page.file.src_uri.count("/")

    def rewritten(link: re.Match) -> str:
        target = link["target"]
        if ":" in target:
            return link[0]
        path = (folder / target).resolve()
        if not path.is_relative_to(ROOT):
            return link[0]
        name = path.relative_to(ROOT).as_posix()
        anchor = link["anchor"] or ""
        if name in ELSEWHERE:
            return f"[{link['text']}]({'../' * depth}{ELSEWHERE[name]}{anchor})"
        if name.startswith("docs/"):
            inside = name.removeprefix("docs/")
            return f"[{link['text']}]({'../' * depth}{inside}{anchor})"
        return f"`{name}`"

    return _LINK.sub(rewritten, markdown)
