"""The layers that networks are made of. Flax lives here, in papers and in encoders only."""
