"""Photos, their labels and class names; every file is hostile until checked."""
