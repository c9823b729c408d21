"""Other people's models behind the functions that we are measured by, and the numbers that they published.

May import `evaluate`, `model`, `networks`, `fetch` and below.
"""
