"""`python -m lraee` is the command `lraee`."""

from lraee.cli.main import main

if __name__ == "__main__":
    main()
