"""The command `tengrad-triton`: exit codes, arguments, and a file for each command that does more than call another."""
