"""A training run: its step, optimizer, memory, checkpoints, sample images, and what it leaves."""
