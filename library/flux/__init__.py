"""The frozen FLUX.1 backbone: transformer, autoencoder, text encoders. Knows nothing of depth."""
