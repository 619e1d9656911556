"""From a data source to noised canvases of tokens."""
