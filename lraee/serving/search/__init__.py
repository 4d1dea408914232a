"""Search in embedded photos: the index, thumbnails, and what the page asks for."""
