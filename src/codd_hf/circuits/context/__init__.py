"""How the backbone's hidden states and the tokens before a window steer a circuit."""
