"""The figures of traced memory, kept for later starts: tracing takes seconds."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megaman import schema
from megaman.errors import UserError
from megaman.files import read_json, write_json
from megaman.runtime import package_versions
from megaman.version import VERSION

FILE = "memory_traces.json"  # in the cache's folder
MAX_TRACES = 50  # of as many different runs
FORMAT = 1  # raise it when equal runs are traced differently than before


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class TraceCache:
    """The traced bytes of one kind of run by name.

    They are used for equal settings, base and versions only. A file that is damaged, or was edited,
    is as if it were not there; one that cannot be written is not missed.

    Args:
        folder: where the file is; None for no file.
        settings: everything that the figures depend on, except versions.
    """

    def __init__(self, folder: Path | None, settings: Any):
        self._path = None if folder is None else folder / FILE
        self._key = _digest([FORMAT, VERSION, package_versions(), settings])
        self._figures = dict(self._read().get(self._key, {}))

    def get(self, name: str, trace: Callable[[], int]) -> int:
        """The stored bytes of this name, or those of trace, which are stored then."""
        if name not in self._figures:
            self._figures[name] = trace()
            self._write()
        return self._figures[name]

    def _read(self) -> Mapping[str, dict[str, int]]:
        if self._path is None:
            return {}
        try:
            content = read_json(self._path)
        except (OSError, UserError):
            return {}
        if not _is_file(content) or content["digest"] != _digest(content["traces"]):
            return {}
        return content["traces"]

    def _write(self) -> None:
        if self._path is None:
            return
        others = {key: value for key, value in self._read().items() if key != self._key}
        traces = dict(list(others.items())[-MAX_TRACES + 1 :]) | {self._key: self._figures}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"digest": _digest(traces), "traces": traces})


_is_figures = schema.mapping(schema.whole(0, 2**60), key=schema.text(100), most=100)
_is_file = schema.record(
    {
        "digest": schema.text(64),
        "traces": schema.mapping(_is_figures, key=schema.text(64), most=MAX_TRACES),
    },
    exact=True,
)
