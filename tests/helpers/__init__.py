"""What several test files share: tests import from here, and never from each other."""
