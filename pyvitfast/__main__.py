"""``python -m pyvitfast`` is the ``pyvitfast`` command."""

from pyvitfast.cli import main

if __name__ == "__main__":
    main()
