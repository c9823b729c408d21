"""Writing an opened model as a folder that other libraries open where this package is not installed.

May import `adapters`, `generate` (statistics of tokens), `pipeline`, `hub`, `data`, `model` and below.
"""
