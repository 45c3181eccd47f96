"""How fast robustlens is: ratios to the cost that no implementation can go below, and to its peers.

Times are only compared inside one process, in interleaved rounds. ``python -m benchmarks --help`` runs them.
"""
