"""Files of others: the list with licences and hashes, where they lie, and how they are downloaded.

May import the ground floor only.
"""
