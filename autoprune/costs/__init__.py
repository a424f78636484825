"""Costs of allocations, budgets, and the space of allocations that meet them."""
