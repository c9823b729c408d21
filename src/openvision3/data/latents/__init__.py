"""The latent cache: its files, how it is written and how it is read in place of images.

May import `data` and the ground floor; the VAE is run by `train/encode_latents`.
"""
