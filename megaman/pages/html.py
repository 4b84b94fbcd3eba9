"""What the pages share: a template filled in so that text stays text, and a policy that allows its
own blocks alone."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
# colours and basics; it takes the place of a comment of that name in a template's style
SHARED_STYLE = "page.css"


def render(template: str, filters: dict[str, Callable[..., Any]], **content: Any) -> str:
    """A template of this package as a page; everything in content is escaped, and policy is there
    for its head."""
    source = (TEMPLATES / template).read_text(encoding="utf-8")
    shared = (TEMPLATES / SHARED_STYLE).read_text(encoding="utf-8")
    source = source.replace(f"/* {SHARED_STYLE} */\n", shared)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    return environment.from_string(source).render(policy=content_security_policy(source), **content)


def href(file: str) -> str:
    """A file name is always a path below the page: "./" keeps "//host/x" from meaning anything
    else."""
    return "./" + quote(file)


def content_security_policy(source: str) -> str:
    """The policy of a template: its own style and script by the hash of their text, pictures from
    the disk.

    The hash is taken from the template and not from the finished page, so that markup which got in
    through a prompt could never be allowed by its own hash. The blocks therefore hold no jinja.
    Without a script none may run.
    """
    style, script = (_hash(source, tag) for tag in ("style", "script"))
    return (
        f"default-src 'none'; img-src 'self' file: data:; style-src '{style}'; script-src '{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(source: str, tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", source, flags=re.DOTALL)
    if not blocks:
        return "none"
    (block,) = blocks
    return "sha256-" + base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
