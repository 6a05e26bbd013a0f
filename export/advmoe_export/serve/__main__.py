"""`python -m advmoe_export.serve`."""

import sys

from advmoe_export.serve.command import main

sys.exit(main())
