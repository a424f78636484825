"""Agents, baselines and policies on the pruning environment."""
