"""The host's share of a step: what Python, dispatch and launches take when every GPU kernel takes no time."""
