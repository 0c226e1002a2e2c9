"""Data: layout of a prepared folder, preprocessing, synthetic scenes, the training dataset."""
