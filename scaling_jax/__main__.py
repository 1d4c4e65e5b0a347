import sys

from scaling_jax.cli import main

sys.exit(main())
