"""What an allocation costs, what a budget allows, and the space of allocations that
meet it.
"""
