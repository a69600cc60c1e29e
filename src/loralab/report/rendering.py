"""Templates and values in, a page out: self-contained, with one script that alone may run."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loralab.report.figures import Drawn

TEMPLATES = Path(__file__).with_name("templates")


def rendered(template: str, **values: Any) -> str:
    """Fill a template; what values hold is escaped, style and script are put in whole."""
    style, script = ((TEMPLATES / file).read_text(encoding="utf-8") for file in ("style.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = {"style": Markup(style), "script": Markup(script), "script_hash": f"sha256-{digest}"}
    return environment.get_template(template).render(**page, **values)


def inlined(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Give figures as a template wants them."""
    # The SVG is our own, and every text in it was escaped when it was written.
    return [{"svg": Markup(figure.svg), "title": figure.title, "caption": figure.caption} for figure in drawn]
