"""A Stable Diffusion base: where it comes from, its configurations, its weights, its text encoder."""
