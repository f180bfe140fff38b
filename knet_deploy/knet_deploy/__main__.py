"""``python -m knet_deploy``: the same as the command ``knet-deploy``."""

from __future__ import annotations

import sys

from knet_deploy.cli.main import main

sys.exit(main())
