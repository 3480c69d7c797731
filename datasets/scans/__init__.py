"""Scans, DICOM series, pictures and label files of users: finding, reading, turning, writing."""
