"""`python -m vmod_jax COMMAND`, the same as `vmod COMMAND`."""

import sys

from vmod_jax.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
