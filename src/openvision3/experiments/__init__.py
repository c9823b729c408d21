"""Programs made of whole runs: ablations, comparisons, the live curves and the demo.

May import `train`, `evaluate`, `estimate` and everything below.
"""
