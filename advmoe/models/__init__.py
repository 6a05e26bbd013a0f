"""Backbones as Dense, S-Dense, Sparse-CNN and MoE-CNN, and MoE-ViT."""
