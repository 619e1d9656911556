"""The parameters of a circuit: how latents start, follow one another and emit tokens."""
