"""``python -m trimtab``, and ``accelerate launch -m trimtab train ...``."""

from trimtab.cli import main

if __name__ == "__main__":
    main()
