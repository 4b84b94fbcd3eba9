"""Calls that fail on purpose."""

from __future__ import annotations

import torch


def fail_on(monkeypatch, kind, method: str, calls: set[int], error=torch.OutOfMemoryError):
    """Let the model's method run out of memory at these calls, counted from 1."""
    real, count = getattr(kind, method), 0

    def failing(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count in calls:
            raise error("CUDA out of memory (on purpose)")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(kind, method, failing)
