"""USB-Rec: a language model made a better conversational recommender.

torch's threads wait for one another in a spin, which ends before long here: with another process on
one of two cores a training step took 5.5 s with torch's default, 3.3 s with this bound, and on idle
cores 1.5 and 1.7 s. It must be set before torch is loaded.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
