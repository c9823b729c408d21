"""The cost of a run before it starts: operations, memory, hours, network, disk and money.

May import the configs and the optimiser of `train`, `generate` (config, network and token space), `hub`, `networks`, `model`, `data` and below.
"""
