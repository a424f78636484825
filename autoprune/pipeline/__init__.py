"""The stages of a run around the search, and the pruning methods that they call."""
