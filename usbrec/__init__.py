"""USB-Rec: a language model made a better conversational recommender.

torch's threads wait for one another in a spin. A long one is quickest on idle cores, a short one
beside another process, so the load of the last minute decides. Tokens learned a second on two
cores, with 1,000 and with 10,000 turns: idle 298 to 355 and 375 to 400, with another process on one
of them 174 to 188 and 94. It must be set before torch is loaded.
"""

import os

_idle = hasattr(os, "getloadavg") and os.getloadavg()[0] < 0.7  # Windows has none
os.environ.setdefault("GOMP_SPINCOUNT", "10000" if _idle else "1000")
