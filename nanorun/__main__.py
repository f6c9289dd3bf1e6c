"""`python -m nanorun`."""

from nanorun.cli import main

if __name__ == "__main__":
    main()
