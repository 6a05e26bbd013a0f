"""Backbones as Dense, S-Dense and MoE-CNN."""
