"""Data sets: their descriptions, and how slices and volumes are read, resized and augmented."""
