"""Measuring: evaluators are functions of functions and return numbers with the protocol that they used.

May import `data`, `networks`, `report` and below; it has not heard of any model (`peers` loads foreign ones), nor of runs.
"""
