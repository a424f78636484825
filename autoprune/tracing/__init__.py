"""From a forward pass to groups of coupled channels, each proven numerically.

`autoprune.tracing.trace.trace` is the way in. The modules behind it, in the order in
which a trace passes through them:

- `dispatch` runs the network and hands every operation to its rule in `rules`;
- `tracer` remembers which channel labels met which axis of which tensor;
- `constraint_solver` joins labels that the code's reshaping ties together;
- `grouping` turns labels into groups, `mac_coverage` says how much they can reach;
- `masking` and `verify` prove that pruned equals masked, group by group.

`channel_statistics` runs a traced network again and sums up what its layers read.
"""
