"""`python -m lraee` is the command `lraee`."""

from lraee.cli import main

if __name__ == "__main__":
    main()
