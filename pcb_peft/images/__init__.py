"""Image and video models: one name for every module, whatever trainer wrote it; a table of names per architecture."""
