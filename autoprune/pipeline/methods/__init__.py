"""What a run removes, and how."""
