"""What `make docs` adds to the pages of docs/: links, cross-references, the help and the architecture."""
