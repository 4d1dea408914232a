"""The command `lraee`, one file per command."""
