"""`python -m timm_vitres` is the command `timm-vitres`, for what starts Python by a module's name, such as torchrun."""

import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
