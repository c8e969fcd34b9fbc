"""What the autoregressive flows share: couplings, inverses, guidance."""
