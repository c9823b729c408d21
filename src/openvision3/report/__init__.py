"""What every page shares: HTML, sheets of images, plots and their palette.

May import the ground floor only.
"""
