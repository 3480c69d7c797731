"""What a test run reports: tables, pictures, one HTML page. `python -m report` writes the page."""
