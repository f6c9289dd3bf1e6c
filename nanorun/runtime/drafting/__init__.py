"""Guessing tokens ahead, for the model to check in one batch."""
