"""The version, for --version and pyproject.toml."""

VERSION = "1.0.0"
