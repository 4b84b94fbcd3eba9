"""A LoRA in a base's models, and in the files of PEFT, diffusers and kohya."""
