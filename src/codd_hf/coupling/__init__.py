"""What joins a backbone and a head: windows, heads, adapters, scores."""
