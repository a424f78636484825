"""Depth and image size as things to prune, beside the widths of channel groups."""
