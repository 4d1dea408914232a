"""Embeddings for many: folders and archives of photos to Parquet."""
