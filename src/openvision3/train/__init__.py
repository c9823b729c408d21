"""Training: configs and recipes, the run of any trainable, its loop, its folder, its checkpoints.

`pretrain` puts OpenVision 3 together and may import all below; `loop` and what it uses have not heard of it.
"""
