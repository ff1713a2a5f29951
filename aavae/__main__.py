"`python -m aavae` is the command `aavae`."

import sys

from .cli import main

sys.exit(main())
