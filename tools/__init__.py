"""Programs about adapter files."""
