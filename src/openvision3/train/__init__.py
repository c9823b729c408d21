"""Training: recipes and configs, the run of any trainable (`run`), its loop, folder and checkpoints, and pre-training.

May import data, model, evaluate, hub, pipeline and what lies below. `run`, `loop` and what they use know nothing of OpenVision 3; `pretrain` does.
"""
