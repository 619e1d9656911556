"""Several processes: how they begin, and what they share."""
