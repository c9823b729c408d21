"""Talk about images: a language model behind our encoder as in LLaVA, its training, its data and the chat.

May import: pipeline and what lies below it, adapters, train.run and what it needs, evaluate.protocol. Knows no command line.
"""
