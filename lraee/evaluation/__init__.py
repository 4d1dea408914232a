"""What a model answers on real photos, beside its float form."""
