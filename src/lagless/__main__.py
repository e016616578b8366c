"""``python -m lagless`` is ``lagless``."""

from lagless.cli import main

if __name__ == "__main__":
    main()
