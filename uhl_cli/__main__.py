"""`python -m uhl_cli`."""

from uhl_cli.cli.main import main

if __name__ == "__main__":
    main()
