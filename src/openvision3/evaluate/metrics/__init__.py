"""The metrics, one family a file: reconstruction, distances between sets, retrieval and zero-shot, captions, probes, accuracy.

May import `evaluate`, `networks`, `data` and below.
"""
