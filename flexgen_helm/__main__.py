"""`python -m flexgen_helm` is the same as `flexgen-helm`."""

import sys

from flexgen_helm.run import main

sys.exit(main())
