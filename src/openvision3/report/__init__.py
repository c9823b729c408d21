"""What all pages share: `html` (pages from templates), `sheets` (images side by side), `plots` (every figure, in one palette).

May import the ground floor only.
"""
