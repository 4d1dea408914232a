"""What is done to a model: accelerate, restore, trace, save, load."""
