"""`python -m sfrt` is the command line."""

from sfrt.cli import main

if __name__ == "__main__":
    main()
