"""Helpers under the names that scripts of the field import."""
