"""Other people's frozen networks that we look through: perceptual distances, Inception and OpenCLIP's layout.

May import `model/transformer`, `data`, `fetch` and the ground floor.
"""
