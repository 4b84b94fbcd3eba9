"""Opens a page in the user's browser (--open)."""

from __future__ import annotations

import logging
import os
import sys
import webbrowser
from pathlib import Path

log = logging.getLogger(__name__)


def show_page(page: Path, content: str, opens: bool) -> None:
    """Log where a page with this content is, and open it if opens."""
    log.info("%s; open %s in a browser", content, page.resolve().as_uri())
    if opens:
        open_page(page)


def open_page(page: Path) -> None:
    """Open a page in a browser window, or log its address if that is not possible."""
    address = page.resolve().as_uri()
    if not (_has_screen() and _open(address)):
        log.info("--open: no browser was found here; the page is %s", address)


def _has_screen() -> bool:
    """Whether a window could be shown; Python would else open a browser in the terminal."""
    if sys.platform in ("win32", "darwin"):
        return True
    return bool({"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"} & set(os.environ))


def _open(address: str) -> bool:
    try:
        return webbrowser.open(address)
    except (OSError, webbrowser.Error):
        return False
