"""Images with captions as batches. OpenMoji, folders and shards are sources of samples; their images are decoded, cropped, ordered and collated.

May import the ground floor only; it does not know models or runs.
"""
