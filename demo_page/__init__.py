"""The local page of `demo.py`: a scan is dropped, segmented, looked at and corrected."""
