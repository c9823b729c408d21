import sys

from openvision3.cli import main

if __name__ == "__main__":  # worker processes that are spawned import this file again
    sys.exit(main())
