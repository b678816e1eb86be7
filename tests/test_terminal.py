"""The command line on terminals of any width and in pipes: every number is there, and nothing is cut."""
