"""``python -m robustlens``."""

from robustlens.cli import main

main()
