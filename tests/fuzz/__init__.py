"""Random calls of every op, held to float64: ``python -m fuzz --seconds 60`` with ``src`` and ``tests`` in PYTHONPATH.

A problem is made from one number alone, which is printed with what it finds; what fails is made smaller while it fails.
"""

from .problem import Problem as Problem
from .run import check as check
