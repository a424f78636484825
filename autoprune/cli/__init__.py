"""The `autoprune` command."""
