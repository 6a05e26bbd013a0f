"""Which images, how they are split, and how they reach the network."""
