"""Programs that make training data."""
