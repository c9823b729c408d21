"""Find images by words or by an image: an index of embeddings, and the answers from it.

May import: pipeline and what lies below it, report. Knows no command line.
"""
