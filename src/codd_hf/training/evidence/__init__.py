"""What a backbone says of noised windows, in memory and on disk."""
