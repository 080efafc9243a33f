"""theta_neon = (1 + w) theta_base - w theta_self_trained on checkpoint files; the same as `neon merge`.

python neon_merge.py --base base.pth --self-trained tuned.pth -w 1.5 --output neon.pth
"""

import sys

from neon.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
