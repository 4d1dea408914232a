"""Files that others may have changed: read strictly, written whole or not at all."""
