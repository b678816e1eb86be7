"""What a finished run is shown as: tables, figures and a Markdown page."""
