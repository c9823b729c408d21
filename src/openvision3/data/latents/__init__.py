"""The latent cache: its settings and files, how it is written, and how it is read in place of images.

May import `data` and the ground floor; `train/encode_latents` runs the VAE.
"""
