"""Data sets, their splits into training and validation images, and batches of them as tensors."""
