"""Data sets of images: the registry of their names, where they come from, and batches of them."""
