# A kernel that freezes or checks a chapter runs this first (PYTHONSTARTUP);
# it leaves no name behind. See figures.py.
import os
import runpy

runpy.run_path(os.path.join(os.path.dirname(os.environ["PYTHONSTARTUP"]),
                            "figures.py"))["watch"]()
del os, runpy
