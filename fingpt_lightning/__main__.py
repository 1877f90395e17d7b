"""``python -m fingpt_lightning`` is the ``fingpt`` program."""

from fingpt_lightning.cli.main import main

if __name__ == "__main__":
    main()
