"""`python -m eptransport` is the command `eptransport`."""

from eptransport.cli import main

if __name__ == "__main__":
    main()
