"""Commands to paste into a shell: sh, or PowerShell on Windows."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

# What needs no quotation marks in PowerShell, nor in the Command Prompt, which knows no single
# ones.
BARE = re.compile(r"[\w:./\\=+-]+", flags=re.ASCII)


def quote(word: str) -> str:
    """A word for sh, or for PowerShell, which takes curly quotation marks for straight ones."""
    if os.name != "nt":
        return shlex.quote(word)
    if BARE.fullmatch(word):
        return word
    return "'" + re.sub("(['\u2018-\u201b])", r"\1\1", word) + "'"


def join(words: Sequence[str]) -> str:
    """The command line of these words."""
    return " ".join(map(quote, words))
