"""The machine and its files: versions, precision, locks, whole files."""
