"""What a network is made of: groups of coupled channels, their labels, and slicing."""
