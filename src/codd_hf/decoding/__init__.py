"""From a canvas of mask tokens to text, step by step."""
