"""Texts: tokens and their vocabulary, pairs with rewards, sets made by `zoo prepare`."""
