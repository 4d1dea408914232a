"""What runs on this machine, and whether it computes what it is defined to."""
