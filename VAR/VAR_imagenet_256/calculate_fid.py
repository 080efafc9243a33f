"""VAR/calculate_fid.py under the path of the published command; the resolution is recognised from the checkpoint."""

import sys

from VAR.calculate_fid import main

if __name__ == "__main__":
    sys.exit(main())
