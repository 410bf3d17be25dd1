"""python -m mlx_xformer: the command line."""

import sys

from .cli import main

sys.exit(main())
