"""What a prediction over the vocabulary says to the latents."""
