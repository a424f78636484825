"""From a forward pass to groups of coupled channels, each proven numerically."""
