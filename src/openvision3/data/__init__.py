"""Images and words as batches: folders, tables, OpenMoji and shards as sources of samples, opened, cropped, ordered and collated.

May import the ground floor only; it has not heard of models and runs.
"""
