"""How good a network is before fine-tuning: importance, accuracy and the proxy."""
