"""Several processes as one, and the signals that ask them to stop."""
