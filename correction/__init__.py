"""Correct a segmentation by prompts: points and boxes, each of which speaks of one organ."""
