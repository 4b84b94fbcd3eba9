"""Rendering of the pages: all text is escaped, and only the template's own style and script run."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
# Colors and basics, in place of a comment of that name in a template's style.
SHARED_STYLE = "page.css"
LANGUAGE = "language.js"  # the same for the lookup of translations, in a template's script
LOADS_SCRIPTS = "/* loads scripts */"  # a comment in a template's script


def render(template: str, filters: dict[str, Callable[..., Any]], **content: Any) -> str:
    """Fill in a template of this package; content is escaped, and policy is added for the head."""
    environment = _environment(filters)
    code, policy = _compile(template, tuple(filters))
    compiled = environment.template_class.from_code(environment, code, environment.make_globals({}))
    return compiled.render(policy=policy, **content)


def _environment(filters: dict[str, Callable[..., Any]]) -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # no filter is called when a template is compiled
    )
    environment.filters |= filters
    return environment


@cache  # a gallery is written again after every batch
def _compile(template: str, filters: tuple[str, ...]) -> tuple[CodeType, str]:
    """The code of a template that uses filters of these names, and its policy."""
    source = (TEMPLATES / template).read_text(encoding="utf-8")
    shared = (TEMPLATES / SHARED_STYLE).read_text(encoding="utf-8")
    source = source.replace(f"/* {SHARED_STYLE} */\n", shared)
    language = (TEMPLATES / LANGUAGE).read_text(encoding="utf-8")
    source = source.replace(f"/* {LANGUAGE} */\n", language)
    environment = _environment(dict.fromkeys(filters, str))
    return environment.compile(source), content_security_policy(source)


def href(file: str) -> str:
    """The link to a file below the page; "./" keeps "//host/x" from naming another machine."""
    return "./" + quote(file)


def content_security_policy(source: str) -> str:
    """The policy of a template: its own style and script by their hashes, and images on the disk.

    The hashes are those of the template, not of the rendered page: markup from a prompt could
    otherwise be allowed by its own hash. The style and script therefore contain no jinja. Without a
    script none may run. A template whose script loads others says so, and may then do so.
    """
    style, script = (_hash(source, tag) for tag in ("style", "script"))
    trusted = " 'strict-dynamic'" if LOADS_SCRIPTS in source else ""
    return (
        f"default-src 'none'; img-src 'self' file: data:; style-src '{style}'; "
        f"script-src '{script}'{trusted}; base-uri 'none'; form-action 'none'"
    )


def _hash(source: str, tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", source, flags=re.DOTALL)
    if not blocks:
        return "none"
    (block,) = blocks
    return "sha256-" + base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
