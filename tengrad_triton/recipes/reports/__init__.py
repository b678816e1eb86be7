"""A run as tables, figures and a Markdown page."""
