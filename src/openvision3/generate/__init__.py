"""Drawing: RAE (arXiv 2510.11690), a diffusion transformer that draws the tokens of a frozen encoder, its training and its use.

May import `train` (its run and loop, not pre-training), `pipeline`, `hub`, `data`, `model` and what lies below.
"""
