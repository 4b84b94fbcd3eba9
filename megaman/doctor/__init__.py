"""What is wrong with a folder of pictures and captions, for --check_data; no torch."""
