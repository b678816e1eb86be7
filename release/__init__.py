"""What a release needs: `python -m release.smoke` installs an archive in a clean environment and uses it."""
