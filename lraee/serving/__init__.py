"""Answers over HTTP: a batcher, existing clients' protocols and a page to search photos."""
