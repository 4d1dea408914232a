"""Embeddings for many: bulk to Parquet, over HTTP to existing clients, and a page to search."""
