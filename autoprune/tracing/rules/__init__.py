"""How each operation of PyTorch moves channel labels.

`autoprune.tracing.rules.table.RULES` lists the rules and says how to add one.
"""
