"""``python -m polyattn``: the same as the console script ``polyattn``."""

from polyattn.cli import main

if __name__ == "__main__":
    main()
