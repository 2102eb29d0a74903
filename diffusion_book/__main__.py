"""`python -m diffusion_book` is the command `diffusion-book`, also where the scripts folder is not on the PATH."""

import sys

from .cli import main

sys.exit(main())
