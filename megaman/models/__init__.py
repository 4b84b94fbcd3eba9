"""A Stable Diffusion base: where it comes from, configurations, weights, text encoder."""
