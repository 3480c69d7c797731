"""Everything around the training loop of `trainer.py`: data, state, validation, records."""
