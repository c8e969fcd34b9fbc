"""One file per paper. Nothing is registered here: a config names the class it wants."""
