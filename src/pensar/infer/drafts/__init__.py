"""Drafts: ways of guessing the next tokens of a text, for one pass of the model to confirm."""
