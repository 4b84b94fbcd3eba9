"""Prompts and seeds to images, for validation and generation alike."""
