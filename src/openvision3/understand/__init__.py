"""Talking about images: a model of ours as the eye of a language model (LLaVA-1.5, arXiv 2310.03744; LLaVA-NeXT), its training and its use.

May import train.run and what lies below it, adapters, pipeline, hub, data and model.
"""
