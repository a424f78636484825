"""Images and their splits; networks by name and their weights."""
