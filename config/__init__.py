"""Flags and defaults, where values come from, and the folder of a run."""
