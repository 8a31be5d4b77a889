"""`python -m compress`: the command line."""

from compress.cli.main import main

if __name__ == "__main__":
    main()
