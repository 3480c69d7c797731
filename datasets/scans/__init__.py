"""Scans, DICOM series and pictures as users have them: found, read, turned, and label files."""
