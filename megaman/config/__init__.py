"""Settings of both scripts: flags, defaults, presets, the parser; no torch."""
