"""Sources of examples and the one clock that reads them."""
