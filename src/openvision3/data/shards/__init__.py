"""Shards, which are tars of samples: their index, members read by position, remote shards and the look at every sample.

May import `data` and the ground floor.
"""
