"""A run that is begun in a current folder that has been deleted, as by another terminal or a script
that cleans up.

Whole paths still lead somewhere, relative ones do not: they are refused. The run itself then leaves
that folder, since MKL ends a process that loads torch in it, and processes that libraries start
would meet the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

RELATIVE = "is relative to the current folder, which has been deleted"
REMEDY = "give the whole path, or change to a folder that exists (cd)"


def is_deleted() -> bool:
    """Whether the current folder is no more."""
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def leave_deleted_folder() -> None:
    """Change to the root of the file system if the current folder has been deleted.

    It must run before the first import of torch.
    """
    if is_deleted():
        os.chdir(os.sep)


def relative_defaults(places: Mapping[str, str]) -> Iterator[str]:
    """A line for each flag that a run needs, by name, whose value leads nowhere, since the current
    folder has been deleted. It is a default: `values.path` refuses what is typed."""
    if is_deleted():
        for flag, place in places.items():
            if not os.path.isabs(place):
                yield f"--{flag} {place}, the default, {RELATIVE}: {REMEDY}"
