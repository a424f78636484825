"""The training loop, and the methods that take part in it."""
