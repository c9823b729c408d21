"""New captions for a data set: the image-text model that is asked, the files that are read and written, and the work itself.

May import `data` and below.
"""
