"""Downloads from the Hugging Face hub, and the names that a base may have."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from megaman.errors import UserError, summarize_error
from megaman.files import is_network

HUB_TIMEOUT = 20  # seconds until the hub has to answer
PACKAGE = Path(__file__).resolve().parent
# The folder with demo/ and prompts.txt: the repository, or their copy in an installed package.
PROJECT = PACKAGE / "assets" if (PACKAGE / "assets").is_dir() else PACKAGE.parent
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", flags=re.ASCII)
# Removed from the hub by its owner in 2024; the same weights are under the second name.
ALIASES = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}

DEFAULT_BASE = "runwayml/stable-diffusion-v1-5"
EMBEDDED_BASE = "demo/base"  # below PROJECT


def download(
    kind: str,
    name: str,
    choices: Sequence[Sequence[str]],
    is_complete: Callable[[Path], bool],
    remedy: str,
) -> Path:
    """The folder with a repository's files, from the hub or from its cache.

    Args:
        kind: the word for the model in an error message.
        choices: lists of file patterns; the first that gives a complete folder is taken, or else
            the last.
        remedy: for UserError, which is raised if the files cannot be had.
    """
    from httpx2 import HTTPError  # the hub's client lets it through if a connection breaks
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        XetDownloadError,
    )

    no_name = f"The {kind} {name} is neither a folder on this machine nor a name on the hub"
    if Path(name).is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise UserError(no_name, remedy)
    try:
        return _snapshot(name, choices, is_complete)
    except HFValidationError:
        raise UserError(no_name, remedy) from None
    except RepositoryNotFoundError:
        raise UserError(f"The hub has no model {name}, or it needs a login", remedy) from None
    except (HTTPError, XetDownloadError, OSError, RuntimeError, ValueError) as error:
        reason = summarize_error(error)
        raise UserError(
            f"The {kind} {name} is not on this machine and cannot be downloaded ({reason})", remedy
        ) from None


def _snapshot(
    name: str, choices: Sequence[Sequence[str]], is_complete: Callable[[Path], bool]
) -> Path:
    """The folder with the files of the first choice that is complete, or of the last."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    offline = not _answers(name)
    for patterns in choices[:-1]:
        try:
            folder = Path(
                snapshot_download(name, allow_patterns=list(patterns), local_files_only=offline)
            )
        except (IncompleteSnapshotError, LocalEntryNotFoundError):
            continue  # no network, and the cache may hold the files of another choice
        if is_complete(folder):
            return folder
    return Path(snapshot_download(name, allow_patterns=list(choices[-1]), local_files_only=offline))


def _answers(name: str) -> bool:
    """False if the hub does not answer, as behind some firewalls: snapshot_download would wait
    forever."""
    from httpx2 import TimeoutException
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except TimeoutException:
        return False
    except Exception:
        return True  # snapshot_download meets the same error, and looks into the cache
    return True


def is_base(name: str) -> bool:
    """Whether a name is a folder or a .safetensors file on this machine, or could be on the hub.

    The name may come from a file that a stranger wrote.
    """
    if is_network(name):
        return False
    paths = (os.path.expanduser(name), PROJECT / name)
    if HUB_NAME.fullmatch(name) or any(os.path.isdir(path) for path in paths):
        return True
    is_safetensors = name.lower().endswith(".safetensors")
    return is_safetensors and any(os.path.isfile(path) for path in paths)
