"""What an optimizer keeps beside its settings: in memory, in copies of itself, and in files."""
