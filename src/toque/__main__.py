"""`python -m toque`: the command line; this is how the local cluster starts its pods."""

from __future__ import annotations

from toque._children import die_with_parent
from toque.cli import main

if __name__ == "__main__":
    die_with_parent()
    raise SystemExit(main())
