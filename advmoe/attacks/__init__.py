"""Attacks on inputs."""
