"""The command `tengrad-triton`: its arguments, its exit codes, and a file for each larger command."""
