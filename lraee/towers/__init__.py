"""Image towers: how one is read, run and counted. The only room that knows open_clip."""
