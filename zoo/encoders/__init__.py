"""Networks that other papers look through: the autoencoder whose latents they model, the text encoder they listen to."""
