"""What is wrong with a folder of images and captions, for --check_data; no torch."""
