"""`python -m autoprune` is the `autoprune` command."""

import sys

from autoprune.cli.main import main

sys.exit(main())
