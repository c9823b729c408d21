"""Shards, which are tars of samples: scanning and indexing them, reading members by position, fetching remote ones, checking them.

May import `data` and the ground floor.
"""
