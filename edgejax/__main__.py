"""``python -m edgejax`` is the ``edgejax`` program."""

from edgejax.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
