"""``python -m optc``: the same as the command ``optc``."""

from optc.optimizer.cli import main

if __name__ == "__main__":
    main()
