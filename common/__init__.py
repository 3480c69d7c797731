"""Errors of the user's input; reading safely and writing whole."""
