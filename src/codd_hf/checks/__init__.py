"""Checks of what users, files and repositories give."""
