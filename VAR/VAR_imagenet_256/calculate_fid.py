"""VAR/calculate_fid.py under the path of the published command; the resolution is recognised from the checkpoint."""

import sys

from neon.cli.command_line import run_program
from VAR.calculate_fid import ScoreVAR

if __name__ == "__main__":
    sys.exit(run_program(ScoreVAR))
