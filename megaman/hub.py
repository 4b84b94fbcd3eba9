"""A repository on the Hugging Face hub as a folder on this machine, and the names that a base may
have."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from megaman.errors import UserError, summarize_error
from megaman.files import is_network

PATIENCE = 20  # seconds that the hub has to begin its answer
PROJECT = Path(__file__).resolve().parent.parent
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", flags=re.ASCII)
# Removed from the hub by its owner in 2024; the same weights stand under the second name.
ALIASES = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}

DEFAULT_BASE = "runwayml/stable-diffusion-v1-5"


def download(
    what: str,
    name: str,
    choices: Sequence[Sequence[str]],
    is_complete: Callable[[Path], bool],
    ways_on: str,
) -> Path:
    """The folder with a repository's files, from the hub or from its cache.

    what is the word for it in a message. Each of the choices is a list of patterns of files; of the
    first that gives a complete folder the files are taken, or else of the last. Raises UserError
    with the ways on.
    """
    from httpx2 import HTTPError  # what the hub's client lets through where a connection breaks
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        XetDownloadError,
    )

    if Path(name).is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise UserError(
            f"The {what} {name} is not a folder on this machine nor a name on the hub", ways_on
        )
    try:
        cached = not _answers(name)
        for patterns in choices[:-1]:
            try:
                folder = Path(
                    snapshot_download(name, allow_patterns=list(patterns), local_files_only=cached)
                )
                if is_complete(folder):
                    return folder
            except (IncompleteSnapshotError, LocalEntryNotFoundError):
                pass  # no network, and only the other files were fetched before: they serve as well
        return Path(
            snapshot_download(name, allow_patterns=list(choices[-1]), local_files_only=cached)
        )
    except HFValidationError:
        raise UserError(
            f"The {what} {name} is not a folder on this machine nor a name on the hub", ways_on
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"The hub has no model {name}, or it asks for a login", ways_on) from None
    except (HTTPError, XetDownloadError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The {what} {name} is not on this machine and did not come from the hub ({summarize_error(error)})",
            ways_on,
        ) from None


def _answers(name: str) -> bool:
    """False where the hub keeps silent, as behind some firewalls: snapshot_download would wait for
    it for ever."""
    from httpx2 import TimeoutException
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=PATIENCE)
    except TimeoutException:
        return False
    except Exception:
        return True  # whatever it is, snapshot_download meets it too, and looks into the cache
    return True


def is_base(name: str) -> bool:
    """Whether a name, which may be a stranger's, is a folder or a .safetensors file here, or could
    be on the hub."""
    if is_network(name):
        return False
    places = (os.path.expanduser(name), PROJECT / name)
    one_file = name.lower().endswith(".safetensors") and any(map(os.path.isfile, places))
    return bool(HUB_NAME.fullmatch(name)) or one_file or any(map(os.path.isdir, places))
