"""The study: what early exits and quantization do to a CLIP model, with controls; see schema."""
