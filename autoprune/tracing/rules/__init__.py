"""How each operation of PyTorch moves channel labels."""
