"""The paper's figure, left to right: a box is a class or function, under it the shape of what leaves it.
Tensors only: files, runs and the command line stay outside. May import `distributed`, `draws` and `settings`.

                                                    branch 1, reconstruction
                                                .-> add_noise ----> LatentDecoder ----> VAE.decode
    images ------> VAE.encode ----> Encoder ----|   (B, N, D)       (B, C, H/8, W/8)    (B, 3, H, W)
    (B, 3, H, W)   frozen           (B, N, D)   |                   latent_loss         pixel_loss + perceptual distance
                   (B, C, H/8, W/8) tokens      |
                   latents                      |   branch 2, understanding
                                                |-> pooled -------> contrastive_loss <---- TextEncoder <---- text_ids
                                                |   (B, E)                                 (B, E)            (B, K, T)
                                                '-> Captioner ----> caption_loss <---- caption_ids
                                                    (B, L, V)                          (B, L)

N = (H/16)(W/16) tokens of width D; C latent channels and the 8 are the VAE's own (C = 16 for FLUX.1), E, T, L and D the config's.
`OpenVision3` is the whole figure; its `forward(batch)` is the loss of one training step. Each part is one file: `vae`,
`encoder`, `reconstruction`, `understanding`, `losses`; all networks but the VAE are made of `transformer`. The VAE is frozen, and
gradient flows through its decoder; everything else trains from random weights. `hub` opens the VAE and the perceptual network.
"""
