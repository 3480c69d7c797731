"""Data sets: what they are, how they are read, resampled and augmented."""
