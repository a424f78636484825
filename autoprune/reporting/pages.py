"""Offline HTML pages of one look, from the templates in `assets`."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ASSETS = Path(__file__).parent / "assets"


def render_page(template: str, **values: Any) -> str:
    """A whole page.

    Args:
        template: File of `assets`, which fills the blocks of `page.html.jinja`.
        **values: What it and the page's head show: `headline` and `facts`, rows of
            name and value, among them.
    """
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        # A value that is missing is a mistake here, and no empty place on the page.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
