"""Self-contained HTML and comparison sheets; no torch."""
