"""Training: data, noise, backbone pretraining and the fitting of heads."""
