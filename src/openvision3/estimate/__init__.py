"""What a run costs before it is started: operations, memory, hours and money.

May import `train`'s configs, `model`, `data` and below.
"""
