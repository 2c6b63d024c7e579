"""`python -m anymask`."""

import sys

from anymask.cli import main

sys.exit(main())
