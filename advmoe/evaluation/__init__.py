"""Accuracy, robustness and cost of a trained model."""
