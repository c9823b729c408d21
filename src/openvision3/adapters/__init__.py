"""Our model as the classes of other libraries: transformers (vision tower, dual encoder, processors) and diffusers (autoencoder).

May import `pipeline`, `hub`, `data`, `model` and below. The modules import the other library at their head: import them where they are used.
"""
