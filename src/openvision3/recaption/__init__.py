"""New captions for a data set: the job, the image-to-text model, the files that are read and written, and the run.

May import `data` and below.
"""
