"""The recipe of the built-in model: made-up clips, an autoencoder, then a chunk-causal flow model, on two CPU cores."""
