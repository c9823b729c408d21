"""Other people's frozen networks that we look through: perceptual distances, Inception, OpenCLIP's layout, and models of
transformers that write text.

May import `model/transformer`, `data`, `fetch` and the ground floor.
"""
