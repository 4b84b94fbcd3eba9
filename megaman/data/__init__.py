"""An image's way from a folder up to the micro-batch."""
