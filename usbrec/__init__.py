"""USB-Rec: a language model becomes a better conversational recommender.

torch's threads wait for one another in a busy loop. A long loop is fastest on idle cores, a short
one beside another process. Tokens learned per second on two cores, with at most 1,000 and with
10,000 turns: 298 to 355 and 375 to 400 on idle cores, 174 to 188 and 94 with another process on one
of them. The limit must be set before torch is loaded, so what runs at that time decides it.
"""

import os
from pathlib import Path

_LOAD = Path("/proc/loadavg")  # "0.52 0.60 0.71 RUNNING/ALL LAST"; this process is one that runs
_looks = [_LOAD.read_text() for _ in range(20) if _LOAD.exists()]
_is_alone = any(look.split()[3].startswith("1/") for look in _looks)
os.environ.setdefault("GOMP_SPINCOUNT", "10000" if _is_alone else "1000")
